"""Deletes models from disk and ledger, and what ended downloads leave behind."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from shoal_common.logs import StructuredLogger
from shoal_common.names import ModelId
from shoal_storage.context import StorageContext
from shoal_storage.integrity.consequences import drop_obsolete_quarantine
from shoal_storage.ledger.references import blobs_freed_by
from shoal_storage.section import Held
from shoal_storage.shards import ShardService
from shoal_storage.store.library_records import build_view
from shoal_storage.store.partials import allocated_bytes, delete_partial, refresh_partial, write_partial
from shoal_storage.store.tombstones import begin_delete, finish_delete

log = StructuredLogger("storage")


class ModelDeleter:
    """Deletes models; who may delete which one is decided before, in the same hold of the section."""

    def __init__(self, context: StorageContext, shards: ShardService) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._metadata, self._shards = context.metadata, shards

    async def delete_model(self, held: Held, model: ModelId) -> int:
        """Delete a model, complete, incomplete or arriving, with the blobs that only it needs. Returns bytes freed.

        After an OSError the model is either complete and published, or neither and in `deleting`; then call it again.
        """
        ledger = self._ledger
        await self._shards.drop(held, model)
        await asyncio.to_thread(begin_delete, self._store, model)
        manifest = ledger.begin_deletion(model)
        # Also blobs that are not here: their leaf hashes may be, and an earlier attempt may not have been durable.
        deletable = ledger.blobs.keys() | (
            manifest.blob_sizes.keys() - ledger.unverified.keys() if manifest else set()
        )
        leaving = [blob for blob in blobs_freed_by(model, ledger) if blob in deletable]
        try:
            await asyncio.to_thread(finish_delete, self._store, model, leaving)
            await asyncio.to_thread(self._metadata.delete_records, model)
        finally:
            freed = sum(
                ledger.drop_blob(blob) for blob in await asyncio.to_thread(self._store.missing_files, leaving)
            )
            self._context.publishing.notify(model)
        ledger.end_deletion(model)
        freed += await self.end_reservation(held, model)
        await drop_obsolete_quarantine(held, self._context)
        if offered := self._ledger.offered_library_models.get(model):
            with suppress(OSError):  # logged and retried where the model is published
                await asyncio.to_thread(build_view, self._store.layout, offered)
        return freed

    async def delete_abandoned(self, held: Held, model: ModelId) -> int:
        """Delete what an ended download left. A model that is here stays. Returns bytes freed."""
        if model in self._ledger.stored_manifests:
            return await self.end_reservation(held, model)
        return await self.delete_model(held, model)

    async def end_reservation(self, held: Held, model: ModelId) -> int:
        """End a model's reservation and delete partial blobs that only it wanted. Returns the bytes they occupied."""
        held.require()
        await asyncio.to_thread(self._metadata.end_reservation, model)
        freed = 0
        for blob, partial in list(self._ledger.arrivals.partials.items()):
            if model not in partial.models:
                continue
            remaining = partial.without_model(model)
            if remaining.models:
                # On disk too, or the next start would count both models.
                try:
                    await asyncio.to_thread(
                        write_partial,
                        self._store,
                        blob,
                        partial.size_bytes,
                        remaining.models,
                        remaining.leaves_by_model,
                    )
                except OSError as e:
                    # A full disk takes no file, and this path frees space. After a restart nobody requests this
                    # model, so its share of the reservation ends.
                    log.warning(
                        "cannot write which models need a partial blob; lost on restart", blob=blob, reason=e.strerror
                    )
                self._ledger.arrivals.release_blob(blob, model)
                await asyncio.to_thread(refresh_partial, self._store, blob, self._ledger)
            else:
                freed += await asyncio.to_thread(allocated_bytes, self._store, blob, partial.size_bytes)
                await asyncio.to_thread(delete_partial, self._store, blob)
                self._ledger.arrivals.release_blob(blob, model)
        return freed
