"""A full disk: said plainly, the reserve given up, and room looked for when those ask whom it has stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from shoal_common.errors import DISK_FULL, DiskFull, ShoalError
from shoal_common.logs import Log
from shoal_common.messages.facts import Facts
from shoal_common.messages.questions import AskRoom, EvictionPlan, RoomLeft
from shoal_common.names import ModelRef
from shoal_common.service import Context
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger, human
from shoal_storage.disk import Disk
from shoal_storage.evict import as_told
from shoal_storage.reserve import ReserveFile, Step, decide
from shoal_storage.room import Room

Q = TypeVar("Q")
A = TypeVar("A")
log = Log("storage")

_LOOK_S = 5.0


@contextmanager
def told(what: str) -> Iterator[None]:
    """The only place where what the file system says of a full disk becomes an error of ours."""
    try:
        yield
    except OSError as e:
        if e.errno not in DISK_FULL:
            raise
        raise DiskFull(f"disk full: {e.strerror} while storage was to {what}; free some space") from e


class Full:
    """What storage does about a full disk, and the reserve that it keeps against one."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        section: asyncio.Lock,
        room: Room,
        announcer: Announcer,
    ) -> None:
        self._context, self._disk, self._ledger, self._section = context, disk, ledger, section
        self._room, self._announcer = room, announcer
        self._made_room = False
        """A plan was carried out since there was last enough room: what it removed may be open somewhere still."""
        self._was_full = False

    def guarded(self, what: str, answer: Callable[[Q], Awaitable[A]]) -> Callable[[Q], Awaitable[A]]:
        """An answer that a full disk ends with DiskFull, after the reserve was given up for it and did not help."""

        async def answered(question: Q) -> A:
            try:
                with told(what):
                    return await answer(question)
            except DiskFull as e:
                if not isinstance(e.__cause__, OSError) or not await self._give_up():
                    raise
            with told(what):
                return await answer(question)

        return answered

    async def room(self, question: AskRoom) -> RoomLeft:
        """Whether all that is on its way fits the disk now, one plan having been carried out where that is wanted."""
        ModelRef.parse(question.model)
        async with self._section:
            evicted, lack = None, await self._lack()
            if lack and not self._made_room and self._room.limits.eviction_policy == "lru":
                evicted = await self._make_room(lack)
                lack = await self._lack()
            if not lack:
                self._made_room = False
            full = max(lack, key=lambda further: lack[further], default="")
            free = await asyncio.to_thread(self._free_on, full)
            no_file_left = await asyncio.to_thread(self._disk.has_no_file_left)
        await self._announcer.publish()
        headroom, lacking = self._room.limits.headroom_bytes, sum(lack.values())
        words = f"{human(lacking)} more needed, {human(free)} free"
        words += f" on {self._disk.further[full].path}" if full in self._disk.further else ""
        words += f" ({human(headroom)} of it stay free)" if lacking and headroom else ""
        if no_file_left and not lacking:
            words = f"the file system has no room for another file, though {human(free)} are free"
        return RoomLeft(
            enough=not lacking and not no_file_left,
            lacking_bytes=lacking,
            free_bytes=free,
            headroom_bytes=headroom,
            words=words,
            evicted=as_told(evicted) if evicted else None,
        )

    def _free_on(self, further: str) -> int:
        root = self._disk.further.get(further)
        return root.free_bytes() if root else self._disk.free_bytes()

    async def _make_room(self, lack: dict[str, int]) -> EvictionPlan | None:
        def enough(freed: Mapping[str, int]) -> bool:
            return all(freed.get(further, 0) >= lacking for further, lacking in lack.items())

        made = await self._room.plan_to_free(sum(lack.values()), enough)
        if not made.enough:
            return None
        went = await self._room.carry_out(made)
        self._made_room = went.enough
        await self._room.wait_freed(self._lacks_nothing)
        return went

    async def _lacks_nothing(self) -> bool:
        return not await self._lack()

    async def _lack(self) -> dict[str, int]:
        """What all that is on its way still needs beyond what its disk has to give, by root, where it needs any."""
        spaces, headroom = await self._room.spaces(), self._room.limits.headroom_bytes
        await self._settle()
        # When all bytes are here, a name in a directory may be what is lacking.
        lack = {s.further: max(-s.to_give(headroom), 0) for s in spaces if s.in_flight_bytes}
        if not spaces[0].in_flight_bytes and not spaces[0].free_bytes:
            lack[""] = 1
        return {further: lacking for further, lacking in lack.items() if lacking}

    # The reserve

    async def watch(self) -> None:
        """Keep the free space in the liveness facts true, and the reserve where there is room for it."""
        while True:
            try:
                free = await self.look()
                self._context.liveness.set_facts(Facts(disk_free_bytes=free))
            except (OSError, ShoalError) as e:  # NATS is away, say: the next look tells what this one could not
                log.warning("the disk could not be looked at", why=str(e))
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> int:
        """Make or give up reserves, and log that the disk is full, or no more. Returns free bytes, of all roots."""
        if any(step != "leave" for _, step in await asyncio.to_thread(self._steps)):
            async with self._section:
                await self._settle()
            await self._announcer.publish()
        free = await asyncio.to_thread(self._disk.free_bytes)
        if (free == 0) != self._was_full:
            self._was_full = free == 0
            if self._was_full:
                log.warning(
                    "the disk is full: nothing comes in until space is freed, by `shoal rm` or `shoal gc` say",
                    store=self._disk.layout.root,
                )
            else:
                log.info("the disk has space again", free_bytes=free)
        return free + await asyncio.to_thread(self._free_on_further)

    def _free_on_further(self) -> int:
        roots = {root.device: root for root in list(self._disk.further.values())}
        return sum(root.free_bytes() for device, root in roots.items() if device != self._disk.device)

    def _steps(self) -> list[tuple[ReserveFile, Step]]:
        """What to do with each root's reserve. Blocking."""
        headroom, in_flight = self._room.limits.headroom_bytes, self._ledger.in_flight_by_root
        held = [("", self._disk.reserve)] + [(r.id, r.reserve) for r in list(self._disk.further.values())]
        return [
            (r, decide(r.held_bytes, r.size_bytes, self._free_on(further), headroom, in_flight[further]))
            for further, r in held
        ]

    async def _settle(self) -> None:
        """Within the section."""
        for reserve, step in await asyncio.to_thread(self._steps):
            if step == "make":
                try:
                    await asyncio.to_thread(reserve.make)
                except OSError as e:
                    log.warning("the reserve could not be made", why=e.strerror)
            elif step == "give up":
                given = await asyncio.to_thread(reserve.give_up)
                log.warning("the reserve was given up for what has to be written", freed_bytes=given)

    async def _give_up(self) -> bool:
        """Give up every reserve that is held: which disk a write was refused by, its error does not say."""
        async with self._section:
            held = [self._disk.reserve, *(root.reserve for root in self._disk.further.values())]
            given = sum([await asyncio.to_thread(reserve.give_up) for reserve in held])
        if given:
            log.warning("the reserve was given up: the disk is full", freed_bytes=given)
        return bool(given)
