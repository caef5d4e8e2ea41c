"""What is said of a download: sampled, coalesced to one write a second, phases at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

from msgspec import structs

from shoal_common import clock, telemetry
from shoal_common.buckets import Bucket, download_key
from shoal_common.errors import Unavailable
from shoal_common.messages.records import DownloadPhase, DownloadState
from shoal_common.pace import Pace
from shoal_fetcher.decide import HUB

PUBLISH_S = 1.0
_SPEED_WEIGHT = 0.4
"""Of the newest second in the moving average of a speed."""
_MOST_SWITCHED = 16


class Progress:
    """The only publisher of one `state.download` key."""

    def __init__(self, bucket: Bucket, state: DownloadState) -> None:
        self._bucket = bucket
        self._key = download_key(state.node, state.model)
        self.state = state
        self._parts: dict[str, int] = {}
        self._whole_bytes = state.done_bytes
        self._received: dict[str, int] = dict(state.sources)
        self._last_received, self._last_at_s = dict(self._received), time.monotonic()
        self._speeds: dict[str, float] = {}
        self._switched = dict(state.switched)
        self._untold = AsyncExitStack()
        self._dirty = False
        self._moved_at_s = time.monotonic()
        self._writing = asyncio.Lock()
        self._said, self._written_at_s = False, 0.0
        self._asked_count = self._answered_count = 0

    @property
    def still_s(self) -> float:
        """Seconds since the last leaf became durable, without those that were excused."""
        return time.monotonic() - self._moved_at_s

    def moved(self) -> None:
        """Something moved that is not bytes: a wait that was asked of us."""
        self._moved_at_s = time.monotonic()

    def excuse(self, waited_s: float) -> None:
        """So long we waited for our own turn."""
        self._moved_at_s = min(self._moved_at_s + waited_s, time.monotonic())

    async def paced(self, pace: Pace, count: int) -> None:
        """Return when so many bytes may pass. Our own limits are no reason to call a download stuck."""
        asked_at_s = time.monotonic()
        await pace.take(count)
        self.excuse(time.monotonic() - asked_at_s)

    def pacing(self, pace: Pace) -> Callable[[int], Awaitable[None]]:
        """`paced` by this pace."""
        return lambda count: self.paced(pace, count)

    def received(self, source: str, count: int) -> None:
        """Bytes came in from a source."""
        self._received[source] = self._received.get(source, 0) + count
        self._dirty = True
        telemetry.transferred(count, "hub" if source == HUB else "peer", "in")

    def left(self, source: str) -> None:
        """A source was silent for too long and is left, for another or for a new try."""
        if source in self._switched or len(self._switched) < _MOST_SWITCHED:
            self._switched[source] = self._switched.get(source, 0) + 1
            self._dirty = True

    def durable(self, blob: str, size_bytes: int) -> None:
        """So much of a blob that is arriving is durable. Bytes received are no progress: they may never add up."""
        if size_bytes > self._parts.get(blob, 0):
            self.moved()
        self._dirty |= size_bytes != self._parts.get(blob)
        self._parts[blob] = size_bytes

    def total(self, size_bytes: int) -> None:
        """So many bytes are to be here at the end."""
        self.state = structs.replace(self.state, total_bytes=size_bytes)
        self._dirty = True

    @property
    def done_bytes(self) -> int:
        """Bytes that are durable now, said or not."""
        return self._whole_bytes + sum(self._parts.values())

    def note(self, waiting_for: str) -> None:
        """What it waits for now, or "": said with the next second's word."""
        if self.state.waiting_for != waiting_for:
            self.state = structs.replace(self.state, waiting_for=waiting_for)
            self._dirty = True

    def whole(self, blob: str, sha256: str, size_bytes: int, root: str = "") -> None:
        """A blob is complete: peers may have it from the next word on, verified by the list with this root."""
        self._parts.pop(blob, None)
        self._whole_bytes += size_bytes
        self.moved()
        known = {**self.state.known, blob: sha256} if blob != sha256 else self.state.known
        roots = {**self.state.roots, sha256: root} if root else self.state.roots
        self.state = structs.replace(self.state, blobs=[*self.state.blobs, sha256], known=known, roots=roots)
        self._dirty = True

    def restart(self) -> None:
        """Count the blobs anew: what is here is about to be asked again."""
        self._parts.clear()
        self._whole_bytes = 0
        self.state = structs.replace(self.state, blobs=[], known={}, roots={})

    def when_told(self, then: AsyncExitStack) -> None:
        """Close this once what is so now has been said. Who must not forget it is not kept waiting."""
        self._untold.push_async_exit(then)
        self._dirty = True

    async def say(self, **changes: Any) -> None:
        """Change fields. A new phase is published now, all else PUBLISH_S after the last word; what is so, never."""
        if self._said and all(getattr(self.state, name) == value for name, value in changes.items()):
            return
        new: DownloadPhase = changes.get("phase", self.state.phase)
        at_once = not self._said or new != self.state.phase or self._wait_s <= 0
        self.state = structs.replace(self.state, **changes)
        self._dirty = True
        if at_once:
            await self.publish()

    async def publish(self) -> None:
        """Write the state as it is now. Many who ask at once share one write."""
        self._asked_count += 1
        mine, self._written_at_s = self._asked_count, time.monotonic()
        async with self._writing:
            if self._answered_count >= mine:
                return
            answers, untold = self._asked_count, self._untold
            self._untold, self._dirty = AsyncExitStack(), False
            self._measure()
            try:
                await self._bucket.put(self._key, self.state)
            except BaseException:
                self._dirty = True
                self._untold.push_async_exit(untold)
                raise
            self._said, self._answered_count = True, answers
        await untold.aclose()

    def _measure(self) -> None:
        now_s = time.monotonic()
        elapsed_s = now_s - self._last_at_s
        fetching = self.state.phase == "fetching"
        if elapsed_s >= PUBLISH_S / 2:
            for source, total in self._received.items():
                sample, speed = (total - self._last_received.get(source, 0)) / elapsed_s, self._speeds.get(source, 0)
                self._speeds[source] = sample if not speed or not sample else speed + _SPEED_WEIGHT * (sample - speed)
            self._last_received, self._last_at_s = dict(self._received), now_s
        speeds = {source: round(speed) for source, speed in self._speeds.items() if fetching and round(speed)}
        speed, left_bytes = sum(speeds.values()), self.state.total_bytes - self.done_bytes
        self.state = structs.replace(
            self.state,
            done_bytes=self.done_bytes,
            verified_bytes=self._whole_bytes,
            sources=dict(self._received),
            source_speeds=speeds,
            speed_bytes_per_s=speed,
            eta_s=round(max(left_bytes, 0) / speed, 1) if speed else None,
            switched=dict(self._switched),
            updated_at_s=round(clock.now_s(), 3),
        )

    @property
    def _wait_s(self) -> float:
        """Seconds until something that is no new phase may be written."""
        return self._written_at_s + PUBLISH_S - time.monotonic()

    async def publish_forever(self) -> None:
        """Once a second, if anything changed. Idle is silent, and has no speed."""
        while True:
            await asyncio.sleep(self._wait_s if self._wait_s > 0 else PUBLISH_S)
            if self._wait_s <= 0 and (self._dirty or self.state.speed_bytes_per_s):
                # Bytes may flow from the hub while NATS is away: the next second says more.
                with suppress(Unavailable):
                    await self.publish()

    async def close(self) -> None:
        """Nothing more is said: what waited for a word does not wait any more."""
        await self._untold.aclose()
