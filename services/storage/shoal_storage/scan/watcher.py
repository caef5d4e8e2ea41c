"""When to scan the store: on change notifications, every minute without them, and now and then as a backstop."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from watchfiles import watch

from shoal_common.logs import StructuredLogger
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.scan.reconciler import StoreReconciler

log = StructuredLogger("storage")

BACKSTOP_INTERVAL_S = 600.0
"""Between scans without notifications: a full kernel queue drops them silently."""
FALLBACK_INTERVAL_S = 60.0
"""Between scans where the file system sends no notifications."""
MIN_SCAN_INTERVAL_S = 1.0
"""Minimum time between two scans."""
PRESENCE_CHECK_INTERVAL_S = 5.0
"""Between two checks that the store is present."""
_DEBOUNCE_MS = 1000
_POLL_MS = 500


class StoreWatcher:
    """Starts a scan of the store when one is due."""

    def __init__(self, layout: VolumePaths, reconciler: StoreReconciler) -> None:
        self._layout, self._reconciler = layout, reconciler
        self._scanned_s = float("-inf")
        self._fallback_logged = False

    async def watch_forever(self) -> None:
        """Watch and scan forever; errors of either are logged and survived."""
        while True:
            try:
                await self._watch_changes()
            except (OSError, RuntimeError) as e:  # watchfiles' own errors are RuntimeErrors
                await self._scan_at_intervals(str(e))

    async def _watch_changes(self) -> None:
        """Return when the store is missing, the watch has lost a directory, or a volume was attached or detached."""
        paths, stop, loop = self._layout, threading.Event(), asyncio.get_running_loop()
        # Notifications may name real paths, whatever links lead there.
        volumes = list(paths.each_volume())
        blob_directories = [volume.blobs.parent for _, volume in volumes]
        by_real_path = {d.resolve(strict=True): d for d in (*blob_directories, paths.manifests, paths.views)}
        notifications = watch(
            *by_real_path,
            watch_filter=None,
            debounce=_DEBOUNCE_MS,
            step=_POLL_MS,
            stop_event=stop,
            rust_timeout=round(PRESENCE_CHECK_INTERVAL_S * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
        )
        # A thread of its own: it waits for as long as the service runs.
        executor = ThreadPoolExecutor(1, thread_name_prefix="watch")
        try:
            next_changes = loop.run_in_executor(executor, next, notifications, None)
            await self._scan()
            first = True
            while (changes := await next_changes) is not None:
                changed = {Path(path) for _, path in changes}
                replaced = changed & by_real_path.keys() or volumes != list(paths.each_volume())
                if replaced or not await self._reconciler.check_store_present():
                    # The watch follows the old directories, which may have been replaced: start over.
                    await asyncio.sleep(MIN_SCAN_INTERVAL_S)
                    return
                next_changes = loop.run_in_executor(executor, next, notifications, None)
                in_store = {
                    directory / path.relative_to(real)
                    for path in changed
                    for real, directory in by_real_path.items()
                    if path.is_relative_to(real)
                }
                # The first scan covers changes between the scan above and the start of the watch.
                await self._tick(
                    first or (bool(in_store) and await self._reconciler.has_visible_change(in_store)),
                    BACKSTOP_INTERVAL_S,
                )
                first = False
        finally:
            stop.set()
            executor.shutdown(wait=False)

    async def _scan_at_intervals(self, error: str) -> None:
        """Scan at intervals for a while, then return so that watching is tried again."""
        if not await self._reconciler.check_store_present():
            await asyncio.sleep(PRESENCE_CHECK_INTERVAL_S)
            return
        if not self._fallback_logged:
            self._fallback_logged = True
            log.warning(
                "no change notifications; scanning the store at intervals",
                interval_s=FALLBACK_INTERVAL_S,
                error=error,
            )
        retry_watch_s = time.monotonic() + max(FALLBACK_INTERVAL_S, PRESENCE_CHECK_INTERVAL_S)
        while time.monotonic() < retry_watch_s:
            await self._tick(False, FALLBACK_INTERVAL_S)
            await asyncio.sleep(min(PRESENCE_CHECK_INTERVAL_S, FALLBACK_INTERVAL_S))

    async def _tick(self, scan_now: bool, interval_s: float) -> None:
        if scan_now or self._reconciler.is_scan_due or time.monotonic() - self._scanned_s >= interval_s:
            await self._scan()

    async def _scan(self) -> None:
        await asyncio.sleep(max(0.0, self._scanned_s + MIN_SCAN_INTERVAL_S - time.monotonic()))
        self._scanned_s = time.monotonic()
        try:
            await self._reconciler.scan()
        except OSError as e:
            log.warning("store scan failed; keeping the previous state", error=str(e))
