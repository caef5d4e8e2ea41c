"""Keep the ledger in step with the disk while storage runs: files that people delete, replace or copy in."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.service import Context
from shoal_storage.files.metadata_files import Keeping
from shoal_storage.integrity.consequences import Losses
from shoal_storage.ledger.completeness import having, mend
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.publisher import Announcer
from shoal_storage.scan.change_filter import any_differs
from shoal_storage.scan.diff import Differences, differences, follow
from shoal_storage.scan.scanner import scan
from shoal_storage.shards import Parts
from shoal_storage.store.store import Disk
from shoal_storage.store.views import places_of, unlink

log = Log("storage")


class Rescan:
    """Scans the disk and updates ledger and published state to match it. Deletes nothing."""

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
        """Set when there are files to hash."""
        self._unpublished = False
        self._scans = 0

    async def differs(self, paths: Collection[Path]) -> bool:
        """Return whether changed paths show something that the ledger lacks."""
        async with self._section:
            return await asyncio.to_thread(any_differs, self._disk.layout, self._ledger, paths)

    async def look(self) -> None:
        """Scan the store and apply the differences. What NATS does not take is published the next time."""
        if not await self.is_there():
            return
        async with self._section:
            seen = await asyncio.to_thread(scan, self._disk.layout)
            if not await asyncio.to_thread(self._disk.is_all_there):
                return  # a volume was unmounted during the scan: files that were not seen may still exist
            self._scans += 1
            log.debug("store scanned", scans=self._scans)
            diff = await asyncio.to_thread(differences, self._ledger, seen)
            if diff.any_in(self._ledger):
                await self._apply(diff)
            await self.announce_found()
            await self._drop_lost_shards()
        await self.tell_untold()
        if self._ledger.unproven:
            self.unproven.set()

    async def _apply(self, diff: Differences) -> None:
        for sha256 in diff.replaced:
            # The file in the blob's place may be its very own, written to: no view may keep it.
            ledger = self._ledger
            places = places_of(self._disk.layout, sha256, having(sha256, ledger), ledger.leases.values())
            await asyncio.to_thread(unlink, places, diff.unproven[sha256].inode)
        foreign = diff.unknown if diff.unknown != self._ledger.unknown else None
        changed = follow(diff, self._ledger)
        log.info(
            "store changed on disk",
            blobs_gone=len(diff.gone | diff.vanished),
            unverified=len(diff.unproven),
            manifests_gone=",".join(sorted(diff.removed)),
            models_lost=",".join(changed.lost),
            models_found=",".join(changed.found),
        )
        if foreign is not None and foreign.count:
            first = ",".join(foreign.paths)
            log.warning("foreign files in the store; left alone", count=foreign.count, first=first)
        await self.tell(changed.lost, changed.found)
        for model in sorted(diff.unlinked & self._ledger.manifests.keys()):
            if not await self._link(model):
                await self.tell([model], [])

    async def announce_found(self) -> None:
        """Publish models that have become complete. Within the critical section."""
        if completed := mend(self._ledger):
            await self.tell([], completed)

    async def _drop_lost_shards(self) -> None:
        try:
            if await self._parts.drop_lost():
                await self._announcer.publish()
        except (ShoalError, OSError) as e:
            self._retry_later(e)

    def _retry_later(self, error: Exception) -> None:
        self._unpublished = True
        log.warning("store state not published; retrying", error=str(error))

    async def tell(self, lost: list[str], found: list[str]) -> None:
        """Unpublish lost models and publish found ones, now or when NATS is back. Within the critical section."""
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
                    log.info("model found on disk", model=model, size_bytes=manifest.size_bytes)
            await self._announcer.publish()
        except (ShoalError, OSError) as e:
            self._retry_later(e)

    async def publish(self) -> None:
        """Publish the disk's state, now or when NATS is back."""
        await self.tell([], [])

    async def _link(self, model: str) -> bool:
        try:
            await asyncio.to_thread(self._disk.build_view, self._ledger.manifests[model])
        except OSError as e:
            log.warning("model view cannot be built; model not published", model=model, error=str(e))
            self._ledger.broken[model] = self._ledger.manifests.pop(model)
            return False
        return True

    async def tell_untold(self) -> None:
        """Publish again what an outage of NATS kept from being published."""
        if not self._unpublished:
            return
        try:
            async with self._section:
                await self._announcer.announce_all()
            self._unpublished = False
        except (ShoalError, OSError) as e:
            self._retry_later(e)

    async def is_there(self) -> bool:
        """Return whether the store is present; while it is missing, its models are unpublished and no scan counts.

        An unmounted disk deletes nothing: the ledger keeps its contents and publishes them when the store is back.
        """
        present = await asyncio.to_thread(self._disk.is_there)
        if present == (not self._ledger.away):
            return present
        async with self._section:
            self._ledger.away = not present
            self._unpublished = True
        path = self._disk.layout.root
        if present:
            log.info("store is back", path=path)
        else:
            log.error("store is missing: mount its disk or put it back; its models are not offered", path=path)
        await self.tell_untold()
        return present
