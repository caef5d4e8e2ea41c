"""Keep the ledger in step with the disk while storage runs: files that people delete, replace or copy in."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from shoal_common.errors import ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.service import ServiceContext
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.integrity.consequences import IntegrityPublisher
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import manifests_with_blob
from shoal_storage.publisher import StatePublisher
from shoal_storage.scan.change_filter import has_visible_change
from shoal_storage.scan.diff import StoreDiff, apply_diff, diff_store
from shoal_storage.scan.scanner import scan_store
from shoal_storage.shards import ShardService
from shoal_storage.store.commit import link_view
from shoal_storage.store.store import Store
from shoal_storage.store.views import delete_files, view_paths_of

log = StructuredLogger("storage")


class StoreReconciler:
    """Scans the disk and updates ledger and published state to match it. Deletes nothing."""

    def __init__(
        self,
        context: ServiceContext,
        store: Store,
        ledger: Ledger,
        section: asyncio.Lock,
        metadata: MetadataFiles,
        publisher: StatePublisher,
        integrity: IntegrityPublisher,
        shards: ShardService,
    ) -> None:
        self._context, self._store, self._ledger, self._section = context, store, ledger, section
        self._metadata, self._publisher, self._integrity, self._shards = metadata, publisher, integrity, shards
        self.unverified_found = asyncio.Event()
        """Set when there are files to hash."""
        self._unpublished = False
        self._scans = 0

    async def has_visible_change(self, paths: Collection[Path]) -> bool:
        """Return whether changed paths show something that the ledger lacks."""
        async with self._section:
            return await asyncio.to_thread(has_visible_change, self._store.layout, self._ledger, paths)

    async def scan(self) -> None:
        """Scan the store and apply the differences. What NATS does not take is published the next time."""
        if not await self.check_store_present():
            return
        async with self._section:
            scan = await asyncio.to_thread(scan_store, self._store.layout)
            if not await asyncio.to_thread(self._store.are_all_present):
                return  # a volume was unmounted during the scan: files that were not seen may still exist
            self._scans += 1
            log.debug("store scanned", scans=self._scans)
            diff = await asyncio.to_thread(diff_store, self._ledger, scan)
            if diff.changes_ledger(self._ledger):
                await self._apply(diff)
            await self.publish_completed_models()
            await self._drop_lost_shards()
        await self.publish_pending()
        if self._ledger.unverified:
            self.unverified_found.set()

    async def _apply(self, diff: StoreDiff) -> None:
        for sha256 in diff.replaced_blobs:
            # The file in the blob's place may be its very own, written to: no view may keep it.
            ledger = self._ledger
            view_paths = view_paths_of(
                self._store.layout, sha256, manifests_with_blob(sha256, ledger), ledger.uses.leases.values()
            )
            await asyncio.to_thread(delete_files, view_paths, diff.unverified[sha256].inode)
        foreign = diff.foreign if diff.foreign != self._ledger.foreign else None
        changed = apply_diff(diff, self._ledger)
        log.info(
            "store changed on disk",
            blobs_gone=len(diff.lost_blobs | diff.unverified_gone),
            unverified=len(diff.unverified),
            manifests_gone=",".join(sorted(diff.removed_models)),
            models_lost=",".join(changed.lost_models),
            models_found=",".join(changed.found_models),
        )
        if foreign is not None and foreign.count:
            first = ",".join(foreign.paths)
            log.warning("foreign files in the store; left alone", count=foreign.count, first=first)
        await self.publish_model_changes(changed.lost_models, changed.found_models)
        for model in sorted(diff.unlinked_models & self._ledger.manifests.keys()):
            if not await self._link(model):
                await self.publish_model_changes([model], [])

    async def publish_completed_models(self) -> None:
        """Publish models that have become complete. Within the critical section."""
        if completed := self._ledger.mark_complete():
            await self.publish_model_changes([], completed)

    async def _drop_lost_shards(self) -> None:
        try:
            if await self._shards.drop_incomplete():
                await self._publisher.publish_storage()
        except (ShoalError, OSError) as e:
            self._retry_later(e)

    def _retry_later(self, error: Exception) -> None:
        self._unpublished = True
        log.warning("store state not published; retrying", error=str(error))

    async def publish_model_changes(self, lost_models: list[str], found_models: list[str]) -> None:
        """Unpublish lost models and publish found ones, now or when NATS is back. Within the critical section."""
        try:
            if lost_models:
                instances = await self._integrity.unpublish(lost_models)
                await self._context.events.emit("model_lost", models=lost_models, instances=instances)
            for model in found_models:
                if await self._link(model):
                    manifest = self._ledger.manifests[model]
                    await asyncio.to_thread(self._metadata.record_arrival, model)
                    await self._publisher.publish_model(manifest)
                    await self._context.events.emit("model_found", model=model, size_bytes=manifest.size_bytes)
                    log.info("model found on disk", model=model, size_bytes=manifest.size_bytes)
            await self._publisher.publish_storage()
        except (ShoalError, OSError) as e:
            self._retry_later(e)

    async def publish_state(self) -> None:
        """Publish the disk's state, now or when NATS is back."""
        await self.publish_model_changes([], [])

    async def _link(self, model: str) -> bool:
        try:
            await asyncio.to_thread(link_view, self._store, self._ledger.manifests[model])
        except OSError as e:
            log.warning("model view cannot be built; model not published", model=model, error=str(e))
            self._ledger.mark_incomplete(model)
            return False
        return True

    async def publish_pending(self) -> None:
        """Publish again what an outage of NATS kept from being published."""
        if not self._unpublished:
            return
        try:
            async with self._section:
                await self._publisher.publish_all()
            self._unpublished = False
        except (ShoalError, OSError) as e:
            self._retry_later(e)

    async def check_store_present(self) -> bool:
        """Return whether the store is present; while it is missing, its models are unpublished and no scan counts.

        An unmounted disk deletes nothing: the ledger keeps its contents and publishes them when the store is back.
        """
        present = await asyncio.to_thread(self._store.is_present)
        if present == (not self._ledger.store_missing):
            return present
        async with self._section:
            self._ledger.set_store_missing(not present)
            self._unpublished = True
        path = self._store.layout.root
        if present:
            log.info("store is back", path=path)
        else:
            log.error("store is missing: mount its disk or put it back; its models are not offered", path=path)
        await self.publish_pending()
        return present
