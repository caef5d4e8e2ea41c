"""A full disk: reports it, gives up the ballast file, and evicts when a stopped download asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from shoal_common.concurrency.threads import DaemonCalls
from shoal_common.errors import DiskFull
from shoal_common.logs import StructuredLogger
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.storage import CheckSpace, EvictionPlan, SpaceCheck
from shoal_common.names import ModelRef
from shoal_common.store.ballast import BallastFile, Step, next_step
from shoal_common.store.disk_full import map_disk_full
from shoal_storage.context import StorageContext
from shoal_storage.eviction.executor import EvictionExecutor
from shoal_storage.eviction.planner import to_message
from shoal_storage.section import Held

Q = TypeVar("Q")
A = TypeVar("A")
log = StructuredLogger("storage")

_CHECK_INTERVAL_S = 5.0
_ANSWER_DEADLINE_S = 10.0


class DiskFullHandler:
    """Handles a full disk, and keeps the ballast file against one."""

    def __init__(self, context: StorageContext, evictions: EvictionExecutor) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._evictions, self._calls = evictions, DaemonCalls()
        self._has_evicted = False
        """A plan was carried out since there was last enough space: what it deleted may still be open somewhere."""
        self._was_full = False

    def with_disk_full_retry(self, action: str, handler: Callable[[Q], Awaitable[A]]) -> Callable[[Q], Awaitable[A]]:
        """Wrap a handler: on a full disk, give up the ballast and retry once. Raises DiskFull if that fails too."""

        async def with_retry(request: Q) -> A:
            try:
                with map_disk_full(f"storage tried to {action}"):
                    return await handler(request)
            except DiskFull as e:
                if not isinstance(e.__cause__, OSError) or not await self._give_up_ballast():
                    raise
            with map_disk_full(f"storage tried to {action}"):
                return await handler(request)

        return with_retry

    async def check_space(self, request: CheckSpace) -> SpaceCheck:
        """Return whether everything arriving fits the disk now. Carries out one eviction plan if `lru` is set."""
        ModelRef.parse(request.model)
        evicted = None
        if self._context.settings.eviction_policy == "lru" and await self._lacks_space():
            evicted = await self._evict()
        async with self._context.section as held:
            lacking_by_volume = await self._shortfall(held)
            if not lacking_by_volume:
                self._has_evicted = False
            full_volume_id = max(lacking_by_volume, key=lambda volume_id: lacking_by_volume[volume_id], default="")
            free = await asyncio.to_thread(self._free_on, full_volume_id)
            no_file_left = await asyncio.to_thread(self._store.is_out_of_inodes)
        await self._context.publishing.publish_soon()
        lacking_bytes, volume = sum(lacking_by_volume.values()), self._store.volumes.get(full_volume_id)
        return SpaceCheck(
            enough=not lacking_bytes and not no_file_left,
            lacking_bytes=lacking_bytes,
            free_bytes=free,
            headroom_bytes=self._context.settings.headroom_bytes,
            volume=str(volume.path) if volume else "",
            out_of_inodes=no_file_left,
            evicted=to_message(evicted) if evicted else None,
        )

    def _free_on(self, volume_id: str) -> int:
        volume = self._store.volumes.get(volume_id)
        return volume.free_bytes() if volume else self._store.free_bytes()

    async def _evict(self) -> EvictionPlan | None:
        async with self._evictions.turn:
            if self._has_evicted:
                return None
            evicted = await self._evictions.evict(self._shortfall)
            self._has_evicted = evicted is not None and evicted.enough
        if evicted is not None:
            await self._evictions.wait_space_released(self._has_enough)
        return evicted

    async def _has_enough(self) -> bool:
        return not await self._lacks_space()

    async def _lacks_space(self) -> bool:
        async with self._context.section as held:
            return bool(await self._shortfall(held))

    async def _shortfall(self, held: Held) -> dict[str, int]:
        """Return the bytes still missing for everything that is arriving, by volume, where any are."""
        spaces, headroom = await self._evictions.refresh_free_space(held), self._context.settings.headroom_bytes
        await self._apply_steps(held)
        # When all bytes are here, the file system may still be unable to add a directory entry.
        lacking_by_volume = {s.volume_id: max(-s.available_bytes(headroom), 0) for s in spaces if s.in_flight_bytes}
        if not spaces[0].in_flight_bytes and not spaces[0].free_bytes:
            lacking_by_volume[""] = 1
        return {volume_id: lacking_bytes for volume_id, lacking_bytes in lacking_by_volume.items() if lacking_bytes}

    # Ballast

    async def check_forever(self) -> None:
        """Refresh the free space in the liveness facts, and the ballast files, periodically."""
        while True:
            try:
                free = await self.check()
                self._context.service.liveness.set_facts(NodeFacts(disk_free_bytes=free))
            except OSError as e:
                log.warning("disk check failed", reason=str(e))
            await asyncio.sleep(_CHECK_INTERVAL_S)

    async def check(self) -> int:
        """Update the ballast files and log when the disk becomes full or has space again. Returns all free bytes."""
        if any(
            step != "leave"
            for _, step in await asyncio.to_thread(self._steps, self._ledger.arrivals.in_flight_by_volume)
        ):
            async with self._context.section as held:
                await self._apply_steps(held)
            self._context.publishing.notify()
        free = await asyncio.to_thread(self._store.free_bytes)
        if (free == 0) != self._was_full:
            self._was_full = free == 0
            if self._was_full:
                log.warning(
                    "disk full: nothing can arrive until space is freed, for example with `shoal rm` or `shoal gc`",
                    store=self._store.layout.root,
                )
            else:
                log.info("the disk has space again", free_bytes=free)
        return free + await self._calls.run("other disks", self._free_on_other_disks, _ANSWER_DEADLINE_S)

    def _free_on_other_disks(self) -> int:
        volumes_by_device = {volume.device: volume for volume in list(self._store.volumes.values())}
        return sum(
            volume.free_bytes() for device, volume in volumes_by_device.items() if device != self._store.device
        )

    def _steps(self, in_flight: Counter[str]) -> list[tuple[BallastFile, Step]]:
        """Decide what to do with each ballast file. Blocking."""
        headroom = self._context.settings.headroom_bytes
        ballasts = [("", self._store.ballast)] + [(r.id, r.ballast) for r in list(self._store.volumes.values())]
        return [
            (
                ballast,
                next_step(
                    ballast.held_bytes, ballast.size_bytes, self._free_on(volume_id), headroom, in_flight[volume_id]
                ),
            )
            for volume_id, ballast in ballasts
        ]

    async def _apply_steps(self, held: Held) -> None:
        """Make and give up ballast files as needed."""
        held.require()
        for ballast, step in await asyncio.to_thread(self._steps, self._ledger.arrivals.in_flight_by_volume):
            if step == "make":
                try:
                    await asyncio.to_thread(ballast.make)
                except OSError as e:
                    log.warning("cannot make the ballast file", reason=e.strerror)
            elif step == "give up":
                freed = await asyncio.to_thread(ballast.release)
                log.warning("ballast given up for reserved data", freed_bytes=freed)

    async def _give_up_ballast(self) -> bool:
        """Give up every ballast file. A failed write does not say which disk refused it."""
        async with self._context.section as held:
            held.require()
            ballasts = [self._store.ballast, *(volume.ballast for volume in self._store.volumes.values())]
            freed = sum([await asyncio.to_thread(ballast.release) for ballast in ballasts])
        if freed:
            log.warning("ballast given up: disk full", freed_bytes=freed)
        return bool(freed)
