"""A bucket as a local dict that follows it, through restarts of NATS.

An ephemeral push consumer sends the last value of each key, then every change. It goes with its server, so each
reconnection makes a new one; what vanished meanwhile is known because the new snapshot does not have it. The watcher
of nats-py does not serve: it leaves its consumer to expire after minutes, takes one that was counted as under way for
one that came, and waits for ever for a snapshot's end that has expired.
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

from shoal_common.buckets import KV_MARKERS, patiently
from shoal_common.connection import Nats
from shoal_common.errors import BadMessage, Unavailable
from shoal_common.logs import Log
from shoal_common.messages import decode

T = TypeVar("T")
log = Log("watch")

_WATCH_RETRY_S = 0.5
_SNAPSHOT_LOOK_S = 1.0
_HEARTBEAT_S = 30.0
_DEAF_S = 2.5 * _HEARTBEAT_S
_FORGOTTEN_S = 60.0
"""The server forgets a consumer that nobody listens to after this long."""
_LAST_SENT, _STALLED = "Nats-Last-Consumer", "Nats-Consumer-Stalled"


class View:
    """What a bucket holds now. `changes` counts changes; wait for the next with `changed_after`."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.changes = 0
        self.comings = 0
        """Counts keys that came or went: what is said anew under a key that stays is none."""
        self.revision = 0
        """Everything in the bucket up to this revision is in here."""
        self._values: dict[str, bytes] = {}
        self._decoded: dict[str, dict[type, object]] = {}
        self._complete = asyncio.Event()
        self._changed = asyncio.Event()

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, decoded once per change. What does not decode is absent, and logged."""
        value = self._values.get(key)
        if value is None:
            return None
        cached = self._decoded.get(key, {}).get(kind)
        if cached is None:
            try:
                cached = decode(value, kind)
            except BadMessage as e:
                log.warning("ignoring a value that does not decode", bucket=self.bucket, key=key, why=e.message)
                return None
            self._decoded.setdefault(key, {})[kind] = cached
        return cached  # type: ignore[return-value]  # the cache's key holds the kind

    def items(self, prefix: str, kind: type[T]) -> Iterator[tuple[str, T]]:
        """All keys under a prefix (`download.`), decoded, in key order."""
        for key in sorted(k for k in self._values if k.startswith(prefix)):
            value = self.get(key, kind)
            if value is not None:
                yield key, value

    def keys(self) -> list[str]:
        """All keys."""
        return list(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    async def changed_after(self, seen: int) -> int:
        """Return the change count once it is beyond `seen`."""
        while self.changes <= seen:
            await self._changed.wait()
        return self.changes

    async def until(self, wanted: Callable[[View], T | None], deadline_s: float) -> T | None:
        """Look at each change until `wanted` returns something; None when the deadline passes first."""
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    seen = self.changes
                    found = wanted(self)
                    if found is not None:
                        return found
                    await self.changed_after(seen)
        except TimeoutError:
            return wanted(self)

    async def reached(self, revision: int) -> None:
        """Return once everything up to a revision is in here."""
        while self.revision < revision:
            await self._changed.wait()

    async def complete(self, deadline_s: float) -> None:
        """Return once the first snapshot is whole. Raises TimeoutError."""
        async with asyncio.timeout(deadline_s):
            await self._complete.wait()

    def apply(self, key: str, value: bytes | None, revision: int = 0) -> None:
        """One change from the server."""
        self._advance(revision)
        before = self._values.get(key)
        if before == value:
            return
        if value is None:
            del self._values[key]
        else:
            self._values[key] = value
        self.comings += before is None or value is None
        self._decoded.pop(key, None)
        self._tell()

    def replace(self, values: dict[str, bytes], revision: int = 0) -> None:
        """A whole new snapshot, after a reconnection."""
        self.revision = revision
        if values != self._values:
            self.comings += values.keys() != self._values.keys()
            self._values, self._decoded = values, {}
            self._tell()
        if not self._complete.is_set():
            self._complete.set()
            self._tell()

    def _advance(self, revision: int) -> None:
        if revision > self.revision:
            self.revision = revision
            self._changed.set()
            self._changed = asyncio.Event()

    def _tell(self) -> None:
        self.changes += 1
        self._changed.set()
        self._changed = asyncio.Event()


async def any_changed(views: Sequence[View], seen: Sequence[int], deadline_s: float | None = None) -> None:
    """Return once any of the views has changed after the count that was seen of it, or after the deadline."""
    waits = [asyncio.ensure_future(view.changed_after(count)) for view, count in zip(views, seen, strict=True)]
    try:
        await asyncio.wait(waits, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def caught_up(nats: Nats, view: View, deadline_s: float) -> None:
    """Return once an unfiltered view holds all that was in its bucket when this was called.

    Views of different buckets run apart: who acts on a change in one (a lease given back) and needs what was
    written to another before it (what the holder has finished) waits here first. Raises TimeoutError.
    """
    async with asyncio.timeout(deadline_s):
        info = await patiently(lambda: nats.js.stream_info(f"KV_{view.bucket}"))
        await view.reached(info.state.last_seq)


async def follow(nats: Nats, view: View, *keys: str) -> None:
    """Keep a view in step with its bucket, or some of its keys (`model.*.>`), for ever. A task of the service."""
    while True:
        try:
            await _follow_once(nats, view, keys or (">",))
        except (NatsError, TimeoutError, Unavailable) as e:
            log.debug("watch ended; starting a new one", bucket=view.bucket, why=str(e) or type(e).__name__)
            await asyncio.sleep(_WATCH_RETRY_S)


class Watch:
    """What one consumer sends, made into a view: the snapshot as a whole, after it change by change."""

    def __init__(self, nats: Nats, view: View, revision: int) -> None:
        self.came = 0
        """Messages received. The server numbers them, so none can be missing unnoticed."""
        self.heard_s = monotonic()
        self.over = asyncio.Event()
        """A message is missing, or the connection was: only a new consumer knows what is true."""
        self._nats, self._view, self._prefix = nats, view, len(f"$KV.{view.bucket}.")
        self._snapshot: dict[str, bytes] | None = {}
        self._revision = revision

    @property
    def whole(self) -> bool:
        """Whether the view has the snapshot."""
        return self._snapshot is None

    async def take(self, message: Msg) -> None:
        """A key's value, its end, or word from the server that nothing happens."""
        self.heard_s = monotonic()
        headers = message.headers or {}
        if "Status" in headers:
            await self._answer(message, headers)
            return
        meta = message.metadata
        self.came += 1
        if meta.sequence.consumer != self.came:
            self.over.set()
        if self.over.is_set():
            return
        value = message.data if KV_MARKERS.isdisjoint(headers) else None
        self._apply(message.subject[self._prefix :], value, meta.sequence.stream)
        if meta.num_pending == 0:
            self._end_snapshot()

    async def _answer(self, message: Msg, headers: dict[str, str]) -> None:
        # The server stops sending until it hears that what it sent has been taken.
        asked = message.reply or headers.get(_STALLED)
        if asked:
            await self._nats.client.publish(asked)
        if int(headers.get(_LAST_SENT, 0)) > self.came:
            self.over.set()

    def _apply(self, key: str, value: bytes | None, revision: int) -> None:
        if self._snapshot is None:
            self._view.apply(key, value, revision)
            return
        self._revision = max(self._revision, revision)
        if value is None:
            self._snapshot.pop(key, None)
        else:
            self._snapshot[key] = value

    def told(self, info: ConsumerInfo) -> None:
        """What the server says of the consumer. With all sent and here, the snapshot is whole."""
        sent = info.delivered.consumer_seq if info.delivered else 0
        if not info.num_pending and self.came >= sent:
            self._end_snapshot()

    def _end_snapshot(self) -> None:
        if self._snapshot is not None:
            self._view.replace(self._snapshot, self._revision)
            self._snapshot = None


async def _follow_once(nats: Nats, view: View, keys: Sequence[str]) -> None:
    """Follow with one consumer until it is over."""
    connection, stream = nats.reconnects.count, f"KV_{view.bucket}"
    # Revisions that nothing is left of (an expired marker) are never delivered: they count as seen.
    watch = Watch(nats, view, (await patiently(lambda: nats.js.stream_info(stream))).state.last_seq)

    async def end_at_reconnection() -> None:
        await nats.reconnects.wait_after(connection)
        watch.over.set()

    ending = asyncio.create_task(end_at_reconnection())
    inbox, name = nats.client.new_inbox(), uuid.uuid4().hex
    subscription = await nats.client.subscribe(inbox, cb=watch.take)
    try:
        made = await nats.js.add_consumer(
            stream,
            name=name,
            deliver_subject=inbox,
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=AckPolicy.NONE,
            filter_subjects=[f"$KV.{view.bucket}.{key}" for key in keys],
            flow_control=True,
            idle_heartbeat=_HEARTBEAT_S,
            inactive_threshold=_FORGOTTEN_S,
            mem_storage=True,
            num_replicas=1,
        )
        watch.told(made)
        while monotonic() - watch.heard_s < _DEAF_S:
            with suppress(TimeoutError):
                async with asyncio.timeout(_DEAF_S if watch.whole else _SNAPSHOT_LOOK_S):
                    await watch.over.wait()
                    return
            if not watch.whole:
                # The last message of a snapshot says that it is the last, unless its key expired on the way.
                watch.told(await nats.js.consumer_info(stream, name))
    finally:
        ending.cancel()
        # Not left to be forgotten: a server may allow a stream no more than a thousand.
        with suppress(Exception):
            async with asyncio.timeout(_WATCH_RETRY_S):
                await subscription.unsubscribe()
                await nats.js.delete_consumer(stream, name)
