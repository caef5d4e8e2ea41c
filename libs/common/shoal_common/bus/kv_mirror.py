"""A bucket mirrored in memory, kept current through restarts of NATS.

An ephemeral push consumer sends the last value of each key, then every change. It dies with its server, so each
reconnection creates a new one; keys that vanished meanwhile are those missing from the new snapshot. The watcher of
nats-py does not do: it leaves its consumer to expire after minutes, counts a pending message as a received one, and
waits for ever for the end of a snapshot whose last key has expired.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import TypeVar

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerInfo, DeliverPolicy

from shoal_common.bus.connection import Nats
from shoal_common.bus.kv_bucket import KV_MARKERS
from shoal_common.bus.streams import MARK_KEY, retry_while_nats_down
from shoal_common.concurrency.notifier import Notifier
from shoal_common.errors import BadMessage, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode

T = TypeVar("T")
log = StructuredLogger("watch")

_RETRY_S = 0.5
_SNAPSHOT_POLL_INTERVAL_S = 1.0
_HEARTBEAT_S = 30.0
_SILENCE_TIMEOUT_S = 2.5 * _HEARTBEAT_S
_INACTIVE_THRESHOLD_S = 60.0
"""After this long the server deletes a consumer that nobody listens to."""
_LAST_SENT, _STALLED = "Nats-Last-Consumer", "Nats-Consumer-Stalled"


class KvMirror:
    """The current contents of a bucket. `changes` counts changes; `wait_changed` waits for the next one."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.key_changes = 0
        """Number of keys that were added or removed; a new value of an existing key does not count."""
        self.revision = 0
        """The mirror holds everything in the bucket up to this revision."""
        self._values: dict[str, bytes] = {}
        self._decoded: dict[str, dict[type, object]] = {}
        self._complete = asyncio.Event()
        self._changed, self._advanced = Notifier(), Notifier()

    @property
    def changes(self) -> int:
        """Number of changes so far."""
        return self._changed.count

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return a key's value, decoded once per change. A value that does not decode is absent, and logged."""
        value = self._values.get(key)
        if value is None:
            return None
        cached = self._decoded.get(key, {}).get(kind)
        if cached is None:
            try:
                cached = decode(value, kind)
            except BadMessage as e:
                log.warning("ignoring a value that does not decode", bucket=self.bucket, key=key, reason=e.message)
                return None
            self._decoded.setdefault(key, {})[kind] = cached
        return cached  # type: ignore[return-value]  # the cache is keyed by kind

    def items(self, prefix: str, kind: type[T]) -> Iterator[tuple[str, T]]:
        """Yield all keys under a prefix (`download.`) with their decoded values, in key order."""
        for key in sorted(k for k in self._values if k.startswith(prefix)):
            value = self.get(key, kind)
            if value is not None:
                yield key, value

    def keys(self) -> list[str]:
        """Return all keys."""
        return list(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    async def wait_changed(self, seen: int) -> int:
        """Return the change count once it exceeds `seen`."""
        return await self._changed.wait_after(seen)

    async def wait_for(self, wanted: Callable[[KvMirror], T | None], deadline_s: float) -> T | None:
        """Call `wanted` at each change until it returns a value; None if the deadline passes first."""
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    seen = self.changes
                    result = wanted(self)
                    if result is not None:
                        return result
                    await self.wait_changed(seen)
        except TimeoutError:
            return wanted(self)

    async def wait_revision(self, revision: int) -> None:
        """Return once the mirror holds everything up to a revision."""
        await self._advanced.wait_until(lambda: self.revision >= revision)

    async def wait_loaded(self, deadline_s: float) -> None:
        """Return once the first snapshot is complete. Raises TimeoutError."""
        async with asyncio.timeout(deadline_s):
            await self._complete.wait()

    def apply(self, key: str, value: bytes | None, revision: int = 0) -> None:
        """Apply one change from the server."""
        self._advance(revision)
        before = self._values.get(key)
        if before == value:
            return
        if value is None:
            del self._values[key]
        else:
            self._values[key] = value
        self.key_changes += before is None or value is None
        self._decoded.pop(key, None)
        self._changed.notify()

    def replace(self, values: dict[str, bytes], revision: int = 0) -> None:
        """Replace everything with a new snapshot, after a reconnection."""
        self.revision = revision
        self._advanced.notify()
        if values != self._values:
            self.key_changes += values.keys() != self._values.keys()
            self._values, self._decoded = values, {}
            self._changed.notify()
        if not self._complete.is_set():
            self._complete.set()
            self._changed.notify()

    def _advance(self, revision: int) -> None:
        if revision > self.revision:
            self.revision = revision
            self._advanced.notify()


async def any_changed(mirrors: Sequence[KvMirror], seen: Sequence[int], deadline_s: float | None = None) -> None:
    """Return once any of the mirrors has changed since its count in `seen`, or after the deadline."""
    waits = [asyncio.ensure_future(mirror.wait_changed(count)) for mirror, count in zip(mirrors, seen, strict=True)]
    try:
        await asyncio.wait(waits, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def wait_caught_up(nats: Nats, mirror: KvMirror, deadline_s: float) -> None:
    """Return once an unfiltered mirror holds all that was in its bucket when this was called.

    Mirrors of different buckets are not synchronized: who acts on a change in one (a released lease) and needs what
    was written to another before it (what the holder has finished) waits here first. Raises TimeoutError.
    """
    async with asyncio.timeout(deadline_s):
        info = await retry_while_nats_down(lambda: nats.js.stream_info(f"KV_{mirror.bucket}"))
        await mirror.wait_revision(info.state.last_seq)


async def follow_forever(nats: Nats, mirror: KvMirror, *keys: str) -> None:
    """Keep a mirror, or some of its keys (`model.*.>`), current for ever. A task of the service."""
    while True:
        try:
            await _follow_once(nats, mirror, keys or (">",))
        except (NatsError, TimeoutError, Unavailable) as e:
            log.debug("consumer ended; starting a new one", bucket=mirror.bucket, reason=str(e) or type(e).__name__)
            await asyncio.sleep(_RETRY_S)


class MirrorConsumer:
    """Applies what one consumer sends to a mirror: the snapshot as a whole, then each change."""

    def __init__(self, nats: Nats, mirror: KvMirror, revision: int) -> None:
        self.received_count = 0
        """Number of messages received. The server numbers them, so a missing one is noticed."""
        self.last_received_s = monotonic()
        self.closed = asyncio.Event()
        """A message was lost, or the connection: only a new consumer knows the current state."""
        self._nats, self._mirror, self._prefix = nats, mirror, len(f"$KV.{mirror.bucket}.")
        self._snapshot: dict[str, bytes] | None = {}
        self._revision = revision

    @property
    def has_snapshot(self) -> bool:
        """Whether the mirror has the snapshot."""
        return self._snapshot is None

    async def on_message(self, message: Msg) -> None:
        """Handle a value, a deletion, or a status message from the server."""
        self.last_received_s = monotonic()
        headers = message.headers or {}
        if "Status" in headers:
            await self._answer(message, headers)
            return
        meta = message.metadata
        self.received_count += 1
        if meta.sequence.consumer != self.received_count:
            self.closed.set()
        if self.closed.is_set():
            return
        value = message.data if KV_MARKERS.isdisjoint(headers) else None
        key = message.subject[self._prefix :]
        self._apply(key, None if key == MARK_KEY else value, meta.sequence.stream)
        if meta.num_pending == 0:
            self._end_snapshot()

    async def _answer(self, message: Msg, headers: dict[str, str]) -> None:
        # Flow control: the server stops sending until it hears that its messages were received.
        reply_to = message.reply or headers.get(_STALLED)
        if reply_to:
            await self._nats.client.publish(reply_to)
        if int(headers.get(_LAST_SENT, 0)) > self.received_count:
            self.closed.set()

    def _apply(self, key: str, value: bytes | None, revision: int) -> None:
        if self._snapshot is None:
            self._mirror.apply(key, value, revision)
            return
        self._revision = max(self._revision, revision)
        if value is None:
            self._snapshot.pop(key, None)
        else:
            self._snapshot[key] = value

    def on_consumer_info(self, info: ConsumerInfo) -> None:
        """Handle the consumer's info. Once all is sent and received, the snapshot is complete."""
        sent = info.delivered.consumer_seq if info.delivered else 0
        if not info.num_pending and self.received_count >= sent:
            self._end_snapshot()

    def _end_snapshot(self) -> None:
        if self._snapshot is not None:
            self._mirror.replace(self._snapshot, self._revision)
            self._snapshot = None


async def _follow_once(nats: Nats, mirror: KvMirror, keys: Sequence[str]) -> None:
    """Follow with one consumer until it ends."""
    connection, stream = nats.reconnects.count, f"KV_{mirror.bucket}"
    # Revisions of which nothing is left (an expired marker) are never delivered: they count as seen.
    watch = MirrorConsumer(
        nats, mirror, (await retry_while_nats_down(lambda: nats.js.stream_info(stream))).state.last_seq
    )

    async def end_at_reconnection() -> None:
        await nats.reconnects.wait_after(connection)
        watch.closed.set()

    ending = asyncio.create_task(end_at_reconnection())
    inbox, name = nats.client.new_inbox(), uuid.uuid4().hex
    subscription = await nats.client.subscribe(inbox, cb=watch.on_message)
    try:
        consumer = await nats.js.add_consumer(
            stream,
            name=name,
            deliver_subject=inbox,
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=AckPolicy.NONE,
            filter_subjects=[f"$KV.{mirror.bucket}.{key}" for key in keys],
            flow_control=True,
            idle_heartbeat=_HEARTBEAT_S,
            inactive_threshold=_INACTIVE_THRESHOLD_S,
            mem_storage=True,
            num_replicas=1,
        )
        watch.on_consumer_info(consumer)
        while monotonic() - watch.last_received_s < _SILENCE_TIMEOUT_S:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SILENCE_TIMEOUT_S if watch.has_snapshot else _SNAPSHOT_POLL_INTERVAL_S):
                    await watch.closed.wait()
                    return
            if not watch.has_snapshot:
                # A snapshot's last message says that it is the last, unless its key has expired meanwhile.
                watch.on_consumer_info(await nats.js.consumer_info(stream, name))
    finally:
        ending.cancel()
        # Deleted, not left to expire: a server may allow a stream no more than a thousand consumers.
        with suppress(Exception):
            async with asyncio.timeout(_RETRY_S):
                await subscription.unsubscribe()
                await nats.js.delete_consumer(stream, name)
