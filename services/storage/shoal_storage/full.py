"""A full disk: said plainly, the reserve given up, and room looked for when those ask whom it has stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
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
from shoal_storage.reserve import Step, decide
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
        self._reserve = disk.reserve
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
            evicted, lacking = None, await self._lacking_bytes()
            if lacking and not self._made_room and self._room.limits.eviction_policy == "lru":
                evicted = await self._make_room(lacking)
                lacking = await self._lacking_bytes()
            if not lacking:
                self._made_room = False
            free = await asyncio.to_thread(self._disk.free_bytes)
            no_file_left = await asyncio.to_thread(self._disk.has_no_file_left)
        await self._announcer.publish()
        headroom = self._room.limits.headroom_bytes
        words = f"{human(lacking)} more needed, {human(free)} free"
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

    async def _make_room(self, lacking_bytes: int) -> EvictionPlan | None:
        made = await self._room.plan_to_free(lacking_bytes)
        if not made.enough:
            return None
        went = await self._room.carry_out(made)
        self._made_room = went.enough
        await self._room.wait_freed(self._lacks_nothing)
        return went

    async def _lacks_nothing(self) -> bool:
        return not await self._lacking_bytes()

    async def _lacking_bytes(self) -> int:
        """What all that is on its way still needs, beyond what the disk has to give."""
        free = await self._room.free_bytes()
        await self._settle()
        if not (in_flight := self._ledger.in_flight_bytes):
            return 0 if free else 1  # all bytes are here: a name in a directory may be what is lacking
        return max(in_flight + self._room.limits.headroom_bytes - free, 0)

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
        """Make or give up the reserve, and log that the disk is full, or no more. Returns its free bytes."""
        free = await asyncio.to_thread(self._disk.free_bytes)
        if self._step(free) != "leave":
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
        return free

    def _step(self, free_bytes: int) -> Step:
        reserve, headroom = self._reserve, self._room.limits.headroom_bytes
        return decide(reserve.held_bytes, reserve.size_bytes, free_bytes, headroom, self._ledger.in_flight_bytes)

    async def _settle(self) -> None:
        """Within the section."""
        step = self._step(await asyncio.to_thread(self._disk.free_bytes))
        if step == "make":
            try:
                await asyncio.to_thread(self._reserve.make)
            except OSError as e:
                log.warning("the reserve could not be made", why=e.strerror)
        elif step == "give up":
            given = await asyncio.to_thread(self._reserve.give_up)
            log.warning("the reserve was given up for what has to be written", freed_bytes=given)

    async def _give_up(self) -> bool:
        async with self._section:
            given = await asyncio.to_thread(self._reserve.give_up)
        if given:
            log.warning("the reserve was given up: the disk is full", freed_bytes=given)
        return bool(given)
