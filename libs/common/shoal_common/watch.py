"""A bucket as a local dict that follows it, through restarts of NATS.

A watcher of nats-py goes deaf when its server restarts, so each reconnection starts a new one; what vanished
meanwhile is known because the new snapshot does not have it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from nats.errors import Error as NatsError
from nats.js.kv import KeyValue

from shoal_common.buckets import patiently
from shoal_common.connection import Nats
from shoal_common.errors import BadMessage, Unavailable
from shoal_common.logs import Log
from shoal_common.messages import decode

T = TypeVar("T")
log = Log("watch")

_WATCH_RETRY_S = 0.5


class View:
    """What a bucket holds now. `changes` counts changes; wait for the next with `changed_after`."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.changes = 0
        self.revision = 0
        """Everything in the bucket up to this revision is in here."""
        self._values: dict[str, bytes] = {}
        self._decoded: dict[tuple[str, type], object] = {}
        self._complete = asyncio.Event()
        self._changed = asyncio.Event()

    def get(self, key: str, kind: type[T]) -> T | None:
        """The value of a key, decoded once per change. What does not decode is absent, and logged."""
        value = self._values.get(key)
        if value is None:
            return None
        cached = self._decoded.get((key, kind))
        if cached is None:
            try:
                cached = decode(value, kind)
            except BadMessage as e:
                log.warning("ignoring a value that does not decode", bucket=self.bucket, key=key, why=e.message)
                return None
            self._decoded[(key, kind)] = cached
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
        if value is None:
            if self._values.pop(key, None) is None:
                return
        elif self._values.get(key) == value:
            return
        else:
            self._values[key] = value
        self._forget(key)
        self._tell()

    def replace(self, values: dict[str, bytes], revision: int = 0) -> None:
        """A whole new snapshot, after a reconnection."""
        self.revision = revision
        if values != self._values:
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

    def _forget(self, key: str) -> None:
        for cached in [c for c in self._decoded if c[0] == key]:
            del self._decoded[cached]

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


async def follow(nats: Nats, view: View, keys: str = ">") -> None:
    """Keep a view in step with its bucket, for ever. Runs as a task of the service."""
    while True:
        connection = nats.reconnects.count
        try:
            await _follow_once(nats, view, keys, connection)
        except (NatsError, TimeoutError, Unavailable) as e:
            log.debug("watch ended; starting a new one", bucket=view.bucket, why=str(e) or type(e).__name__)
            await asyncio.sleep(_WATCH_RETRY_S)


async def _sent_to(watcher: KeyValue.KeyWatcher) -> int:
    # nats-py says that all has come when nothing is pending at the server and nothing is here yet: what is under way
    # between the two makes a snapshot without anything. The server knows how much it has sent.
    subscription: Any = watcher._sub
    info = await patiently(subscription.consumer_info)
    return int(info.delivered.consumer_seq) if info.delivered else 0


async def _follow_once(nats: Nats, view: View, keys: str, connection: int) -> None:
    bucket = await patiently(lambda: nats.js.key_value(view.bucket))
    # Revisions that nothing is left of (an expired marker) are never delivered: they count as seen.
    revision = (await patiently(lambda: nats.js.stream_info(f"KV_{view.bucket}"))).state.last_seq
    watcher = await bucket.watch(keys)

    async def end_at_reconnection() -> None:
        await nats.reconnects.wait_after(connection)
        await watcher.stop()  # type: ignore[no-untyped-call]  # nats-py

    ending = asyncio.create_task(end_at_reconnection())
    snapshot: dict[str, bytes] | None = {}
    entry: KeyValue.Entry | None
    came, sent = 0, None
    try:
        async for entry in watcher:
            if entry is None:
                sent = await _sent_to(watcher)
            elif snapshot is not None:
                came += 1
                revision = max(revision, entry.revision or 0)
                if entry.operation:
                    snapshot.pop(entry.key, None)
                else:
                    snapshot[entry.key] = entry.value or b""
            if snapshot is not None:
                if sent is not None and came >= sent:
                    view.replace(snapshot, revision)
                    snapshot = None
            elif entry is not None:
                view.apply(entry.key, None if entry.operation else entry.value or b"", entry.revision or 0)
    finally:
        ending.cancel()
        with suppress(Exception):
            await asyncio.wait_for(watcher.stop(), _WATCH_RETRY_S)  # type: ignore[no-untyped-call]  # nats-py
