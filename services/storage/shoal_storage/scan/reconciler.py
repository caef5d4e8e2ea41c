"""Keep the ledger in step with the disk while storage runs: files that people delete, replace or copy in."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_storage.context import StorageContext
from shoal_storage.integrity.consequences import drop_obsolete_quarantine, instances_using
from shoal_storage.ledger.references import manifests_with_blob
from shoal_storage.scan.change_filter import has_visible_change
from shoal_storage.scan.diff import StoreDiff, apply_diff, diff_store
from shoal_storage.scan.scanner import StoreScan, rescan, scan_store
from shoal_storage.section import Held
from shoal_storage.shards import ShardService
from shoal_storage.store.commit import link_view
from shoal_storage.store.views import delete_files, view_paths_of

log = StructuredLogger("storage")


class ModelChanges(msgspec.Struct):
    """Models (`org/name@commit`) that are lost or found, to be reported once the section has been left."""

    lost: list[ModelId] = []
    found: list[Manifest] = []


class StoreReconciler:
    """Scans the disk and updates the ledger to match it. Deletes nothing."""

    def __init__(self, context: StorageContext, shards: ShardService) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._shards = shards
        self.unverified_found = asyncio.Event()
        """Set when there are files to hash."""
        self.is_scan_due = False
        """Whether storage changed the disk during the last scan, which may have taken its files for foreign ones."""
        self._scans = 0

    async def has_visible_change(self, paths: Collection[Path]) -> bool:
        """Return whether changed paths show something that the ledger lacks."""
        async with self._context.section as held:
            held.require()
            return await asyncio.to_thread(has_visible_change, self._store.layout, self._ledger, paths)

    async def scan(self) -> None:
        """Scan the store and apply the differences, after a second look at each of them in the critical section."""
        if not await self.check_store_present():
            return
        before = self._context.section.transitions
        scan = await asyncio.to_thread(scan_store, self._store.layout)
        async with self._context.section as held:
            if not await asyncio.to_thread(self._store.are_all_present):
                return  # a volume was unmounted during the scan: files that were not seen may still exist
            self._scans += 1
            log.debug("store scanned", scans=self._scans)
            is_disturbed = self._context.section.transitions != before + 1
            self.is_scan_due = is_disturbed and scan.foreign != self._ledger.foreign
            if is_disturbed:
                scan.foreign = self._ledger.foreign
            changes = await self._reconcile(held, scan)
        await self.report(changes)
        if self._ledger.unverified:
            self.unverified_found.set()

    async def _reconcile(self, held: Held, scan: StoreScan) -> ModelChanges:
        layout, changes = self._store.layout, ModelChanges()
        diff = await asyncio.to_thread(diff_store, self._ledger, scan)
        suspects = diff.changed_blobs | self._ledger.redundant_copies.keys(), diff.changed_models
        if diff.changes_ledger(self._ledger):
            # Storage may have changed these after the scan had read them.
            await asyncio.to_thread(rescan, layout, scan, *suspects)
            diff = await asyncio.to_thread(diff_store, self._ledger, scan)
        if diff.changes_ledger(self._ledger):
            changes = await self._apply(held, diff)
        completed = await self.complete_models(held)
        await self._shards.drop_incomplete(held)
        return ModelChanges(changes.lost, changes.found + completed.found)

    async def _apply(self, held: Held, diff: StoreDiff) -> ModelChanges:
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
        changes = await self.settle(held, changed.lost_models, changed.found_models)
        for model in sorted(diff.unlinked_models & self._ledger.manifests.keys()):
            if not await self._link(held, model):
                changes.lost.append(model)
        return changes

    async def complete_models(self, held: Held) -> ModelChanges:
        """Find the models that have become complete."""
        completed = self._ledger.mark_complete()
        return await self.settle(held, [], completed) if completed else ModelChanges()

    async def settle(
        self, held: Held, lost_models: Iterable[ModelId], found_models: Iterable[ModelId]
    ) -> ModelChanges:
        """Have lost models unpublished, and found ones published once their views are built. Then `report` these."""
        await drop_obsolete_quarantine(held, self._context)
        changes = ModelChanges(lost=list(lost_models))
        for model in found_models:
            if await self._link(held, model):
                await asyncio.to_thread(self._context.metadata.record_arrival, model)
                changes.found.append(self._ledger.manifests[model])
        self._context.publishing.notify(*changes.lost, *(m.model for m in changes.found))
        return changes

    async def report(self, changes: ModelChanges) -> None:
        """Have changes published, and emit their events."""
        if not changes.lost and not changes.found:
            return
        await self._context.publishing.publish_soon()
        events = self._context.events
        if changes.lost:
            instances = instances_using(self._context, changes.lost)
            await events.emit("model_lost", models=changes.lost, instances=instances)
        for manifest in changes.found:
            await events.emit("model_found", model=manifest.model, size_bytes=manifest.size_bytes)
            log.info("model found on disk", model=manifest.model, size_bytes=manifest.size_bytes)

    async def _link(self, held: Held, model: ModelId) -> bool:
        held.require()
        try:
            await asyncio.to_thread(link_view, self._store, self._ledger.manifests[model])
        except OSError as e:
            log.warning("model view cannot be built; model not published", model=model, error=str(e))
            self._ledger.mark_incomplete(model)
            self._context.publishing.notify(model)
            return False
        return True

    async def check_store_present(self) -> bool:
        """Return whether the store is present; while it is missing, its models are unpublished and no scan counts.

        An unmounted disk deletes nothing: the ledger keeps its contents and publishes them when the store is back.
        """
        present = await asyncio.to_thread(self._store.is_present)
        if present == (not self._ledger.store_missing):
            return present
        async with self._context.section as held:
            held.require()
            self._ledger.set_store_missing(not present)
        path = self._store.layout.root
        if present:
            log.info("store is back", path=path)
        else:
            log.error("store is missing: mount its disk or put it back; its models are not offered", path=path)
        self._context.publishing.notify_all()
        return present
