"""The ledger follows the disk while storage runs: files that people removed, replaced or copied in."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.service import Context
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger
from shoal_storage.disk import Disk
from shoal_storage.doubt import having, mend
from shoal_storage.glance import any_differs
from shoal_storage.keeping import Keeping
from shoal_storage.losing import Losses
from shoal_storage.parts import Parts
from shoal_storage.scan import scan
from shoal_storage.truth import Differences, differences, follow
from shoal_storage.views import places_of, unlink

log = Log("storage")


class Rescan:
    """Looks at the disk and makes ledger and announcements say what is there. Deletes nothing."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        section: asyncio.Lock,
        keeping: Keeping,
        announcer: Announcer,
        losses: Losses,
        parts: Parts,
    ) -> None:
        self._context, self._disk, self._ledger, self._section = context, disk, ledger, section
        self._keeping, self._announcer, self._losses, self._parts = keeping, announcer, losses, parts
        self.unproven = asyncio.Event()
        """Set when there are files to be hashed."""
        self._untold = False
        self._scans = 0

    async def differs(self, paths: Collection[Path]) -> bool:
        """Whether paths that have changed show anything that the ledger does not say."""
        async with self._section:
            return await asyncio.to_thread(any_differs, self._disk.layout, self._ledger, paths)

    async def look(self) -> None:
        """Scan the store and follow it. What could not be told to NATS is told the next time."""
        if not await self.is_there():
            return
        async with self._section:
            seen = await asyncio.to_thread(scan, self._disk.layout)
            if not await asyncio.to_thread(self._disk.is_all_there):
                return  # something went while we looked: what was not seen may well be there
            self._scans += 1
            log.debug("looked at the disk", scans=self._scans)
            found = await asyncio.to_thread(differences, self._ledger, seen)
            if found.any_in(self._ledger):
                await self._follow(found)
            await self.announce_found()
            await self._lose_parts()
        await self.tell_untold()
        if self._ledger.unproven:
            self.unproven.set()

    async def _follow(self, found: Differences) -> None:
        lay = self._disk.layout
        for sha256 in found.replaced:
            # What stands in the blob's place may be its very file, written to: no view may go on with that.
            places = places_of(lay, sha256, having(sha256, self._ledger), self._ledger.leases.values())
            await asyncio.to_thread(unlink, places, found.unproven[sha256].inode)
        strange = found.unknown if found.unknown != self._ledger.unknown else None
        followed = follow(found, self._ledger)
        log.info(
            "the disk has changed",
            blobs_gone=len(found.gone | found.vanished),
            unproven=len(found.unproven),
            manifests_gone=",".join(sorted(found.removed)),
            models_lost=",".join(followed.lost),
            models_found=",".join(followed.found),
        )
        if strange is not None and strange.count:
            first = ",".join(strange.paths)
            log.warning("unknown files in the store; left alone", count=strange.count, first=first)
        await self.tell(followed.lost, followed.found)
        for model in sorted(found.unlinked & self._ledger.manifests.keys()):
            if not await self._link(model):
                await self.tell([model], [])

    async def announce_found(self) -> None:
        """Announce models that have become whole. Within the section."""
        if found := mend(self._ledger):
            await self.tell([], found)

    async def _lose_parts(self) -> None:
        try:
            if await self._parts.drop_lost():
                await self._announcer.publish()
        except (ShoalError, OSError) as e:
            self._untold = True
            log.warning("what the disk holds could not be said; said again soon", why=str(e))

    async def tell(self, lost: list[str], found: list[str]) -> None:
        """Announce these models, or no longer. What NATS does not hear is said later. Within the section."""
        try:
            if lost:
                instances = await self._losses.take_back(lost)
                await self._context.events.tell("model_lost", models=lost, instances=instances)
            for model in found:
                if await self._link(model):
                    manifest = self._ledger.manifests[model]
                    await asyncio.to_thread(self._keeping.came_in, model)
                    await self._announcer.announce(manifest)
                    await self._context.events.tell("model_found", model=model, size_bytes=manifest.size_bytes)
                    log.info("model was found on the disk", model=model, size_bytes=manifest.size_bytes)
            await self._announcer.publish()
        except (ShoalError, OSError) as e:
            self._untold = True
            log.warning("what the disk holds could not be said; said again soon", why=str(e))

    async def publish(self) -> None:
        """Say how the disk stands, now or when NATS hears it again."""
        await self.tell([], [])

    async def _link(self, model: str) -> bool:
        try:
            await asyncio.to_thread(self._disk.build_view, self._ledger.manifests[model])
        except OSError as e:
            log.warning("a model cannot be opened; not announced", model=model, why=str(e))
            self._ledger.broken[model] = self._ledger.manifests.pop(model)
            return False
        return True

    async def tell_untold(self) -> None:
        """Say again what an outage of NATS has kept from being said."""
        if not self._untold:
            return
        try:
            async with self._section:
                await self._announcer.announce_all()
            self._untold = False
        except (ShoalError, OSError) as e:
            log.warning("what the disk holds could not be said; said again soon", why=str(e))

    async def is_there(self) -> bool:
        """Whether the store is where it was. While it is not, its models are not announced, and nothing is concluded.

        An unmounted disk has deleted nothing: the ledger keeps what it said, and says it again when it is back.
        """
        there = await asyncio.to_thread(self._disk.is_there)
        if there == (not self._ledger.away):
            return there
        async with self._section:
            self._ledger.away = not there
            self._untold = True
        where = self._disk.layout.root
        if there:
            log.info("the store is there again", path=where)
        else:
            log.error("the store has gone: mount its disk or put it back; its models are not offered now", path=where)
        await self.tell_untold()
        return there
