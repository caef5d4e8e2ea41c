"""A full disk: the download says so, waits until storage has room again, and goes on by itself.

Nobody has to be asked twice: what frees space shows in the facts of this node's storage, and it is asked again then,
and now and then besides. Storage makes room where its policy is to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal_common import clock
from shoal_common.errors import DiskFull, ErrorBody, ShoalError
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_fetcher.decide import MAX_BLOCKED_S, in_vain_delay_s, look_again_s
from shoal_fetcher.errors import ReservationLost
from shoal_fetcher.partial import probe
from shoal_fetcher.progress import Progress
from shoal_fetcher.storage import Storage
from shoal_fetcher.surroundings import Surroundings

log = Log("blocked")

_AT_LEAST_S = 1.0
"""Between two questions, however often the disk changes."""


class Blockage:
    """What one download does about a full disk, each time that it meets one."""

    def __init__(
        self,
        progress: Progress,
        storage: Storage,
        around: Surroundings,
        layout: Layout,
        clock_s: Callable[[], float] = clock.now_s,
    ) -> None:
        self._progress, self._storage, self._around = progress, storage, around
        self._layout, self._clock_s = layout, clock_s
        # A fetcher that is started again goes on with the same wait: its end must not move away with each start.
        self._durable_bytes = progress.state.done_bytes if progress.state.blocked_since_s else -1
        self._in_vain_count = 0

    async def wait_for_room(self, model: str, met: DiskFull) -> None:
        """Return when it is worth trying again. Raises DiskFull when nothing has come of that for MAX_BLOCKED_S."""
        progress = self._progress
        moved = progress.done_bytes > self._durable_bytes
        self._durable_bytes = progress.done_bytes
        self._in_vain_count = 0 if moved else self._in_vain_count + 1
        now_s = round(self._clock_s(), 3)
        since_s = now_s if moved else progress.state.blocked_since_s or now_s
        log.warning("blocked", model=model, why=met.message)
        error = met.body()
        await progress.say(phase="blocked", waiting_for=met.message, error=error, blocked_since_s=since_s)
        await asyncio.sleep(in_vain_delay_s(self._in_vain_count))
        asked_count, words = 0, met.message
        while True:
            if self._clock_s() - since_s > MAX_BLOCKED_S:
                raise DiskFull(
                    f"the disk was full for {MAX_BLOCKED_S / 3600:.0f} h while {progress.state.model} arrived "
                    f"({words}); what has arrived is kept: free some space and pull again",
                    **met.details,
                )
            seen = self._around.disk()
            try:
                still = await self._look(model, met)
                if still is None:
                    break
                words = still.message
                await progress.say(waiting_for=words, error=still)
            except ShoalError as e:
                log.warning("storage does not say whether there is room", model=model, why=e.message)
            asked_count += 1
            await asyncio.sleep(_AT_LEAST_S)
            await self._around.disk_changed(seen, look_again_s(asked_count))
        log.info("there is room again", model=model)
        progress.moved()

    async def _look(self, model: str, met: DiskFull) -> ErrorBody | None:
        """What still keeps it from getting on; None: nothing that is known."""
        room = await self._storage.room(model)
        if not room.enough:
            return DiskFull(
                f"disk full: {room.words}; free some space and it goes on by itself",
                lacking_bytes=room.lacking_bytes,
                free_bytes=room.free_bytes,
                headroom_bytes=room.headroom_bytes,
            ).body()
        if blob := met.details.get("blob"):
            try:
                await asyncio.to_thread(probe, self._layout.partial(blob))
            except DiskFull as e:
                return e.body()
            except ReservationLost:
                return None  # it is reserved anew
        return None
