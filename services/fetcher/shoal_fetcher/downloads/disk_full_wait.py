"""A full disk: the download reports it, waits until storage has free space again, and resumes.

No command is needed: freed space shows in the facts of this node's storage, which is then asked again, and also at
intervals. Storage evicts if its policy allows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal_common.bus import cluster_clock
from shoal_common.errors import DiskFull, ErrorBody, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.storage import SpaceCheck
from shoal_common.store.store_paths import StorePaths
from shoal_common.units import format_bytes
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.errors import ReservationLost
from shoal_fetcher.partials.disk_writes import probe_disk
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.failure_policy import FUTILE_ATTEMPT_BACKOFF, MAX_BLOCKED_S, SPACE_CHECK_BACKOFF
from shoal_fetcher.storage_client import StorageClient

log = StructuredLogger("blocked")

_MIN_INTERVAL_S = 1.0
"""Between two requests to storage, however often the disk changes."""


class DiskFullWait:
    """Waits for free space on behalf of one download, each time it meets a full disk."""

    def __init__(
        self,
        progress: Progress,
        storage: StorageClient,
        cluster_view: ClusterView,
        layout: StorePaths,
        clock_s: Callable[[], float] = cluster_clock.now_s,
    ) -> None:
        self._progress, self._storage, self._cluster_view = progress, storage, cluster_view
        self._layout, self._clock_s = layout, clock_s
        # A restarted fetcher continues the same wait: its deadline must not move with each start.
        self._durable_bytes = progress.state.done_bytes if progress.state.blocked_since_s else -1
        self._futile_attempts = 0

    async def wait_for_space(self, model: str, disk_full: DiskFull) -> None:
        """Return when a retry is worthwhile. Raises DiskFull if nothing became durable for MAX_BLOCKED_S."""
        progress = self._progress
        moved = progress.done_bytes > self._durable_bytes
        self._durable_bytes = progress.done_bytes
        self._futile_attempts = 0 if moved else self._futile_attempts + 1
        now_s = round(self._clock_s(), 3)
        since_s = now_s if moved else progress.state.blocked_since_s or now_s
        log.warning("disk full, download blocked", model=model, reason=disk_full.message)
        error = disk_full.body()
        await progress.publish_state(
            phase="blocked", waiting_for=disk_full.message, error=error, blocked_since_s=since_s
        )
        await asyncio.sleep(FUTILE_ATTEMPT_BACKOFF.delay_s(self._futile_attempts))
        attempt, reason = 0, disk_full.message
        while True:
            if self._clock_s() - since_s > MAX_BLOCKED_S:
                raise DiskFull(
                    f"the disk was full for {MAX_BLOCKED_S / 3600:.0f} h while {progress.state.model} arrived "
                    f"({reason}); the partial download is kept: free some space and pull again",
                    **disk_full.details,
                )
            disk_before = self._cluster_view.disk_status()
            try:
                shortage = await self._shortage(model, disk_full)
                if shortage is None:
                    break
                reason = shortage.message
                await progress.publish_state(waiting_for=reason, error=shortage)
            except ShoalError as e:
                log.warning("storage did not report its free space", model=model, reason=e.message)
            attempt += 1
            await asyncio.sleep(_MIN_INTERVAL_S)
            await self._cluster_view.wait_disk_changed(disk_before, SPACE_CHECK_BACKOFF.delay_s(attempt))
        log.info("free space again, download resumes", model=model)
        progress.mark_progress()

    async def _shortage(self, model: str, disk_full: DiskFull) -> ErrorBody | None:
        """Return what still blocks the download; None if nothing is known to."""
        space = await self._storage.check_space(model)
        if not space.enough:
            return DiskFull(
                f"disk full: {describe_shortage(space)}; free some space and the download resumes",
                lacking_bytes=space.lacking_bytes,
                free_bytes=space.free_bytes,
                headroom_bytes=space.headroom_bytes,
            ).body()
        if blob := disk_full.details.get("blob"):
            try:
                await asyncio.to_thread(probe_disk, self._layout.partial(blob))
            except DiskFull as e:
                return e.body()
            except ReservationLost:
                return None  # it is reserved again
        return None


def describe_shortage(space: SpaceCheck) -> str:
    """Return for people what is missing: `3.2 GB more needed, 0 B free`."""
    free = format_bytes(space.free_bytes)
    if space.out_of_inodes and not space.lacking_bytes:
        return f"the file system has no free inodes, though {free} are free"
    text = f"{format_bytes(space.lacking_bytes)} more needed, {free} free"
    text += f" on {space.volume}" if space.volume else ""
    return text + (f" ({format_bytes(space.headroom_bytes)} of it stay free)" if space.headroom_bytes else "")
