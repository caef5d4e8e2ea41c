"""Publishes the state of a download: at most once a second, a new phase at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Protocol

from msgspec import structs

from shoal_common import telemetry
from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import download_key
from shoal_common.bus.kv_bucket import Bucket
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.messages.downloads import DownloadState
from shoal_fetcher.sources.failure_policy import HUB
from shoal_fetcher.sources.source_changes import SourceChange, SourceChanges

PUBLISH_INTERVAL_S = 1.0
_SPEED_WEIGHT = 0.4
"""Weight of the newest second in the moving average of a speed."""
_MAX_SWITCHED_SOURCES = 16
_MAX_SOURCE_CHANGES = 16
"""Reported with one update; more are dropped."""


class DownloadListener(Protocol):
    """Receives what only the sources of a download know."""

    def on_waiting(self, reason: str) -> None:
        """A source is waited for; "": it sends again."""

    def on_no_progress(self, path: str, stalled_s: float, reason: str) -> None:
        """No leaf has become durable for so long. Raises Unavailable if that is too long."""

    async def on_source_change(self, change: SourceChange) -> None:
        """Another source serves a file."""


class Progress:
    """The figures of one download, and the only publisher of its `state` key `download.<node>.<model>`."""

    def __init__(
        self, bucket: Bucket, state: DownloadState, listener: DownloadListener, is_published: bool = False
    ) -> None:
        self._bucket, self._listener = bucket, listener
        self._key = download_key(state.node, state.model)
        self.state = state
        self._complete_bytes = state.done_bytes
        self._durable_by_blob: dict[str, int] = {}
        self._after_publish = AsyncExitStack()
        self._dirty = not is_published
        self._writing = asyncio.Lock()
        self._written_at_s = 0.0
        self._requested_writes = self._finished_writes = 0
        self._reset_sources()

    def _reset_sources(self) -> None:
        self._received: dict[str, int] = dict(self.state.sources)
        self._last_received, self._last_at_s = dict(self._received), time.monotonic()
        self._speeds: dict[str, float] = {}
        self._switched = dict(self.state.source_switches)
        self._serving, self._source_changes = SourceChanges(), list[SourceChange]()
        self._progress_at_s = time.monotonic()
        self._others_done_bytes: dict[str, int] = {}

    def begin_attempt(self, forget_sources: bool) -> None:
        """Begin another attempt. What has arrived counts, until storage reports what is present."""
        self._complete_bytes = self.done_bytes
        self._durable_by_blob.clear()
        state = structs.replace(self.state, resumed_bytes=0, denied_by_hub=False)
        if forget_sources:
            now_s = round(cluster_clock.now_s(), 3)
            state = structs.replace(state, sources={}, source_switches={}, started_at_s=now_s)
        self.set_state(state)
        self._reset_sources()

    def set_state(self, state: DownloadState) -> None:
        """Change what is to be published. Its figures of bytes and sources are set at each publish."""
        if state is not self.state and state != self.state:
            self.state, self._dirty = state, True

    @property
    def stalled_s(self) -> float:
        """Seconds since the last leaf became durable, without excused waits."""
        return time.monotonic() - self._progress_at_s

    def mark_progress(self) -> None:
        """Count as progress what is not bytes: a wait that a source asked for."""
        self._progress_at_s = time.monotonic()

    def wait_for_others(self, done_bytes: Mapping[str, int]) -> None:
        """Wait for what these nodes fetch, by what they have now: their progress counts as ours."""
        if done_bytes != self._others_done_bytes:
            self._others_done_bytes = dict(done_bytes)
            self.mark_progress()
        self.set_waiting_for(f"node {', '.join(sorted(done_bytes))}, which may read it from the hub")

    def set_denied(self, denied: bool) -> None:
        """Set whether the hub refuses us the model."""
        self.set_state(structs.replace(self.state, denied_by_hub=denied))

    def pause_stall_timer(self, waited_s: float) -> None:
        """Do not count a wait of this many seconds for our own turn."""
        self._progress_at_s = min(self._progress_at_s + waited_s, time.monotonic())

    async def take_from_limiter(self, limiter: RateLimiter, count: int) -> None:
        """Return when so many bytes may pass. Waiting for our own rate limit does not count as a stall."""
        started_at_s = time.monotonic()
        await limiter.acquire(count)
        self.pause_stall_timer(time.monotonic() - started_at_s)

    def limiter_for(self, limiter: RateLimiter) -> Callable[[int], Awaitable[None]]:
        """Return `take_from_limiter` bound to this rate limiter."""
        return lambda count: self.take_from_limiter(limiter, count)

    def record_received(self, source: str, count: int, path: str = "") -> None:
        """Count bytes of a file received from a source."""
        self._received[source] = self._received.get(source, 0) + count
        self._dirty = True
        telemetry.count_transferred(count, "hub" if source == HUB else "peer", "in")
        change = self._serving.received(path, source, time.monotonic()) if path else None
        if change is not None and len(self._source_changes) < _MAX_SOURCE_CHANGES:
            self._source_changes.append(change)

    def record_source_failure(self, path: str, source: str = "") -> None:
        """Record that a source of a file failed (default: its current one): bytes from another one are a change."""
        self._serving.failed(path, source)

    def record_switch(self, source: str) -> None:
        """Count that a source was left because it sent nothing for too long."""
        if source in self._switched or len(self._switched) < _MAX_SWITCHED_SOURCES:
            self._switched[source] = self._switched.get(source, 0) + 1
            self._dirty = True

    def set_durable_bytes(self, blob: str, size_bytes: int) -> None:
        """Set a partial blob's durable bytes. Received bytes are not progress: they may never become durable."""
        if size_bytes > self._durable_by_blob.get(blob, 0):
            self.mark_progress()
        self._dirty |= size_bytes != self._durable_by_blob.get(blob)
        self._durable_by_blob[blob] = size_bytes

    @property
    def done_bytes(self) -> int:
        """Bytes that are durable now, published or not."""
        return self._complete_bytes + sum(self._durable_by_blob.values())

    def set_waiting_for(self, reason: str) -> None:
        """Set what a source is waited for; "": it sends again. Published with the next second's update."""
        self._listener.on_waiting(reason)

    def check_stalled(self, path: str, last_error: ShoalError | None) -> None:
        """Raise Unavailable if nothing of the download has become durable for too long."""
        reason = last_error.message if last_error else self.state.waiting_for
        self._listener.on_no_progress(path, self.stalled_s, reason)

    def set_blob_complete(self, blob: str, sha256: str, size_bytes: int, leaf_list_digest: str = "") -> None:
        """Mark a blob complete: peers may fetch it from the next update on, verified by the list of this digest."""
        self._durable_by_blob.pop(blob, None)
        self._complete_bytes += size_bytes
        self.mark_progress()
        sha256_by_git_name = (
            {**self.state.sha256_by_git_name, blob: sha256} if blob != sha256 else self.state.sha256_by_git_name
        )
        leaf_list_digests = (
            {**self.state.leaf_list_digests, sha256: leaf_list_digest}
            if leaf_list_digest
            else self.state.leaf_list_digests
        )
        self.state = structs.replace(
            self.state,
            blobs=[*self.state.blobs, sha256],
            sha256_by_git_name=sha256_by_git_name,
            leaf_list_digests=leaf_list_digests,
        )
        self._dirty = True

    def reset_counts(self) -> None:
        """Reset the counts of blobs, before storage says again what is present."""
        self._durable_by_blob.clear()
        self._complete_bytes = 0
        self.state = structs.replace(self.state, blobs=[], sha256_by_git_name={}, leaf_list_digests={})

    def after_publish(self, cleanup: AsyncExitStack) -> None:
        """Close `cleanup` after the current state has been published, without blocking the caller."""
        self._after_publish.push_async_exit(cleanup)
        self._dirty = True

    async def publish_changes(self) -> None:
        """Write the state now, unless it is published already. Raises Unavailable."""
        async with self._writing:
            pass  # a write under way may be of these changes
        if self._dirty:
            await self.publish()

    async def publish(self) -> None:
        """Write the state as it is now. Concurrent callers share one write."""
        self._requested_writes += 1
        own_write, self._written_at_s = self._requested_writes, time.monotonic()
        async with self._writing:
            if self._finished_writes >= own_write:
                return
            covered, after_publish = self._requested_writes, self._after_publish
            self._after_publish, self._dirty = AsyncExitStack(), False
            self._measure()
            try:
                await self._bucket.put(self._key, self.state)
            except BaseException:
                self._dirty = True
                self._after_publish.push_async_exit(after_publish)
                raise
            self._finished_writes = covered
        await after_publish.aclose()
        await self._report_source_changes()

    async def _report_source_changes(self) -> None:
        changes, self._source_changes = self._source_changes, []
        for change in changes:
            await self._listener.on_source_change(change)

    def _measure(self) -> None:
        now_s = time.monotonic()
        elapsed_s = now_s - self._last_at_s
        fetching = self.state.phase == "fetching"
        if elapsed_s >= PUBLISH_INTERVAL_S / 2:
            for source, total in self._received.items():
                sample, speed = (total - self._last_received.get(source, 0)) / elapsed_s, self._speeds.get(source, 0)
                self._speeds[source] = sample if not speed or not sample else speed + _SPEED_WEIGHT * (sample - speed)
            self._last_received, self._last_at_s = dict(self._received), now_s
        speeds = {source: round(speed) for source, speed in self._speeds.items() if fetching and round(speed)}
        speed, left_bytes = sum(speeds.values()), self.state.total_bytes - self.done_bytes
        self.state = structs.replace(
            self.state,
            done_bytes=self.done_bytes,
            verified_bytes=self._complete_bytes,
            sources=dict(self._received),
            source_speeds=speeds,
            speed_bytes_per_s=speed,
            eta_s=round(max(left_bytes, 0) / speed, 1) if speed else None,
            source_switches=dict(self._switched),
            updated_at_s=round(cluster_clock.now_s(), 3),
        )

    @property
    def _wait_s(self) -> float:
        """Seconds until an update without a new phase may be written."""
        return self._written_at_s + PUBLISH_INTERVAL_S - time.monotonic()

    async def publish_forever(self) -> None:
        """Publish once a second if anything changed. An idle download publishes nothing and has no speed."""
        while True:
            await asyncio.sleep(self._wait_s if self._wait_s > 0 else PUBLISH_INTERVAL_S)
            if self._wait_s <= 0 and (self._dirty or self.state.speed_bytes_per_s):
                # Bytes may arrive from the hub while NATS is down: the next second retries.
                try:
                    await self.publish()
                except Unavailable:
                    self.mark_progress()  # what waits for NATS does not stall

    async def close(self) -> None:
        """Run what waits for a publish."""
        await self._after_publish.aclose()
