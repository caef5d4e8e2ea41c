"""When to look at the disk: told by the file system where it can, every minute where it cannot, and now and then."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from watchfiles import watch

from shoal_common.logs import Log
from shoal_storage.rescan import Rescan
from shoal_storage.store_layout import StoreLayout

log = Log("storage")

BACKSTOP_S = 600.0
"""Between scans though nothing was told: a full queue of the kernel drops notices without a word."""
FALLBACK_S = 60.0
"""Between scans where the file system tells nothing."""
APART_S = 1.0
"""Between two scans at least."""
TICK_S = 5.0
"""Between two looks whether the store is there."""
_GATHER_MS = 1000
_STEP_MS = 500


class Watcher:
    """Calls for a scan when one is due."""

    def __init__(self, layout: StoreLayout, rescan: Rescan) -> None:
        self._layout, self._rescan = layout, rescan
        self._scanned_s = float("-inf")
        self._said = False

    async def watch_forever(self) -> None:
        """Endlessly. An error of watching, or of a scan, is logged and outlived."""
        while True:
            try:
                await self._follow_notices()
            except (OSError, RuntimeError) as e:  # what watchfiles raises of its own is a RuntimeError
                await self._without_notices(str(e))

    async def _follow_notices(self) -> None:
        """Until the store is away, the watch has lost a directory, or a further root has come or gone."""
        lay, stop, loop = self._layout, threading.Event(), asyncio.get_running_loop()
        # Notices may name the real paths, whatever links lead there.
        roots = list(lay.all())
        blobs = [root.blobs.parent for _, root in roots]
        real = {d.resolve(strict=True): d for d in (*blobs, lay.manifests, lay.views)}
        notices = watch(
            *real,
            watch_filter=None,
            debounce=_GATHER_MS,
            step=_STEP_MS,
            stop_event=stop,
            rust_timeout=round(TICK_S * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
        )
        # A thread of its own: it waits for as long as the service runs.
        with_thread = ThreadPoolExecutor(1, thread_name_prefix="watch")
        try:
            waiting = loop.run_in_executor(with_thread, next, notices, None)
            await self._scan()
            first = True
            while (changes := await waiting) is not None:
                paths = {Path(path) for _, path in changes}
                if paths & real.keys() or roots != list(lay.all()) or not await self._rescan.is_there():
                    # The watch sticks to directories that may be others now: begin anew.
                    await asyncio.sleep(APART_S)
                    return
                waiting = loop.run_in_executor(with_thread, next, notices, None)
                named = {own / p.relative_to(d) for p in paths for d, own in real.items() if p.is_relative_to(d)}
                # The first time for what changed after that scan and before the watch was in place.
                await self._tick(first or (bool(named) and await self._rescan.differs(named)), BACKSTOP_S)
                first = False
        finally:
            stop.set()
            with_thread.shutdown(wait=False)

    async def _without_notices(self, why: str) -> None:
        """Scan now and then for a while; then watching is tried again."""
        if not await self._rescan.is_there():
            await asyncio.sleep(TICK_S)
            return
        if not self._said:
            self._said = True
            said = "the file system does not tell of changes; looking at the disk now and then"
            log.warning(said, every_s=FALLBACK_S, why=why)
        try_again_s = time.monotonic() + max(FALLBACK_S, TICK_S)
        while time.monotonic() < try_again_s:
            await self._tick(False, FALLBACK_S)
            await asyncio.sleep(min(TICK_S, FALLBACK_S))

    async def _tick(self, wanted: bool, every_s: float) -> None:
        if wanted or time.monotonic() - self._scanned_s >= every_s:
            await self._scan()
        else:
            await self._rescan.tell_untold()

    async def _scan(self) -> None:
        await asyncio.sleep(max(0.0, self._scanned_s + APART_S - time.monotonic()))
        self._scanned_s = time.monotonic()
        try:
            await self._rescan.look()
        except OSError as e:
            log.warning("the disk could not be looked at; what was known of it stands", why=str(e))
