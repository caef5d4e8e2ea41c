"""What is said of a download: sampled, coalesced to one write a second, phases at once."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from msgspec import structs

from shoal_common.buckets import Bucket, download_key
from shoal_common.errors import Unavailable
from shoal_common.messages.records import DownloadState

PUBLISH_S = 1.0
_SPEED_WEIGHT = 0.4
"""Of the newest second in the moving average of the speed."""


class Progress:
    """The only publisher of one `state.download` key."""

    def __init__(self, bucket: Bucket, state: DownloadState) -> None:
        self._bucket = bucket
        self._key = download_key(state.node, state.model)
        self.state = state
        self._parts: dict[str, int] = {}
        self._whole_bytes = state.done_bytes
        self._received: dict[str, int] = dict(state.sources)
        self._last_total, self._last_at_s = sum(self._received.values()), time.monotonic()
        self._dirty = False
        self._moved_at_s = time.monotonic()
        self._writing = asyncio.Lock()
        self._said = False
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

    def received(self, source: str, count: int) -> None:
        """Bytes came in from a source."""
        self._received[source] = self._received.get(source, 0) + count
        self._dirty = True

    def durable(self, blob: str, size_bytes: int) -> None:
        """So much of a blob that is arriving is durable. Bytes received are no progress: they may never add up."""
        if size_bytes > self._parts.get(blob, 0):
            self.moved()
        self._dirty |= size_bytes != self._parts.get(blob)
        self._parts[blob] = size_bytes

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

    async def say(self, **changes: Any) -> None:
        """Change fields and publish now; nothing is written when they are so already."""
        if not self._said or any(getattr(self.state, name) != value for name, value in changes.items()):
            self.state = structs.replace(self.state, **changes)
            await self.publish()

    async def publish(self) -> None:
        """Write the state as it is now. Many who ask at once share one write."""
        self._asked_count += 1
        mine = self._asked_count
        async with self._writing:
            if self._answered_count >= mine:
                return
            answers = self._asked_count
            now_s = time.monotonic()
            total = sum(self._received.values())
            elapsed_s = now_s - self._last_at_s
            speed = self.state.speed_bytes_per_s
            if elapsed_s >= PUBLISH_S / 2:
                sample = (total - self._last_total) / elapsed_s
                speed = sample if not speed or not sample else speed + _SPEED_WEIGHT * (sample - speed)
                self._last_total, self._last_at_s = total, now_s
            self._dirty = False
            self.state = structs.replace(
                self.state,
                done_bytes=self.done_bytes,
                sources=dict(self._received),
                speed_bytes_per_s=round(speed) if self.state.phase == "fetching" else 0.0,
                updated_at_s=round(time.time(), 3),
            )
            await self._bucket.put(self._key, self.state)
            self._said, self._answered_count = True, answers

    async def publish_forever(self) -> None:
        """Once a second, if anything changed. Idle is silent, and has no speed."""
        while True:
            await asyncio.sleep(PUBLISH_S)
            if self._dirty or self.state.speed_bytes_per_s:
                # Bytes may flow from the hub while NATS is away: the next second says more.
                with suppress(Unavailable):
                    await self.publish()
