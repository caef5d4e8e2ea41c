"""The fetch API: reserve, release, commit, seal and manifest, in one critical section over ledger and disk."""

from __future__ import annotations

import asyncio
import time

from msgspec import structs

from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.concurrency.cancellation import run_to_completion
from shoal_common.concurrency.single_flight import SingleFlight
from shoal_common.errors import BadInput, Corrupt, NotFound, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import (
    CommitBlob,
    CommittedBlob,
    GetManifest,
    ModelState,
    Release,
    Reserve,
    ReserveResult,
    SealModel,
)
from shoal_common.names import ModelRef, check_blob, check_commit
from shoal_common.service import ServiceContext
from shoal_common.settings.node import StorageSettings
from shoal_common.store.leaf_hash import hash_leaf_list
from shoal_storage.admission.admission import leaves_to_reserve, requested_leaves
from shoal_storage.admission.manifest_check import check_manifest
from shoal_storage.eviction.executor import EvictionExecutor
from shoal_storage.eviction.planner import to_message
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.leaf_list_verify import CorruptLeaves, clear_leaves
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.handlers.deletion import DeletionService
from shoal_storage.integrity.repair import create_partial
from shoal_storage.leases.last_use import UsageView
from shoal_storage.leases.service import LeaseService
from shoal_storage.ledger.entries import PartialBlobInfo
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import is_offered_by_library, matching_manifests
from shoal_storage.publisher import StatePublisher
from shoal_storage.shards import ShardService
from shoal_storage.store.commit import (
    commit_blob,
    find_by_git_sha1,
    link_view,
    require_all_blobs,
    seal_model,
    set_volume,
)
from shoal_storage.store.partials import has_partial, refresh_partial, verify_partial, write_partial
from shoal_storage.store.store import Store

log = StructuredLogger("storage")

_REPUBLISH_RETRY_S = 5.0
"""Delay before another attempt to publish what the disk holds."""


class FetchApi:
    """Handles a node's fetch requests. Every change of the ledger happens under `_section`."""

    def __init__(
        self,
        context: ServiceContext,
        store: Store,
        ledger: Ledger,
        settings: StorageSettings,
        specs: KvMirror,
        publisher: StatePublisher,
    ) -> None:
        self._context, self._store, self._ledger = context, store, ledger
        self._publisher = publisher
        self._section = asyncio.Lock()
        self.metadata = MetadataFiles(store.layout, ledger)
        self.shards = ShardService(store, ledger, self._section, self.metadata, publisher)
        self.leases = LeaseService(context, store, ledger, self._section, self.shards, publisher)
        usage = UsageView(context, specs, ledger, self.leases.refresh)
        self.deletions = DeletionService(
            context, store, ledger, self._section, self.metadata, self.shards, publisher, usage
        )
        self.evictions = EvictionExecutor(
            context, store, ledger, settings, usage, publisher, self.deletions.delete_model
        )
        self._committing = SingleFlight[CommittedBlob]()

    @property
    def section(self) -> asyncio.Lock:
        """The lock under which ledger and disk are changed."""
        return self._section

    # Requests

    async def reserve(self, request: Reserve) -> ReserveResult:
        """Approve a fetch and reserve its bytes, or raise QuotaExceeded."""
        check_manifest(request.manifest)
        async with self._section:
            manifest, sha256_by_git_name = await self._with_known_hashes(request.manifest)
            model, sizes = manifest.model, manifest.blob_sizes
            requested = requested_leaves(manifest, request.leaf_ranges, self._ledger)
            wanted_leaves = leaves_to_reserve(model, requested, self._ledger)
            # Reserved first, so that the model's own blobs are not evicted to make space for it.
            with self._ledger.arrivals.reserving(model, sizes) as is_new:
                admission, evicted = await self.evictions.admit(manifest, wanted_leaves)
                if is_new:
                    await asyncio.to_thread(self.metadata.write_reservation, model)
                for blob in admission.missing:
                    volume_id = admission.volume_by_blob[blob]
                    await self._reserve_blob(blob, sizes[blob], model, wanted_leaves.get(blob), volume_id)
                await asyncio.to_thread(self.metadata.record_wanted, model, time.time())
        await self._publisher.publish_storage()
        log.info(
            "space reserved",
            model=manifest.model,
            needed_bytes=admission.needed_bytes,
            present=len(admission.present),
        )
        eviction_plan = to_message(evicted) if evicted else None
        return ReserveResult(
            present=admission.present,
            missing=admission.missing,
            sha256_by_git_name=sha256_by_git_name,
            evicted=eviction_plan,
        )

    async def _reserve_blob(
        self, blob: str, size_bytes: int, model: str, wanted_leaves: int | None, volume_id: str
    ) -> None:
        arrivals, was_quarantined = self._ledger.arrivals, False
        existing = arrivals.partials.get(blob)
        if existing is None:
            await asyncio.to_thread(set_volume, self._store, blob, volume_id)
        before = existing or PartialBlobInfo(size_bytes)
        partial = before.with_model(model, wanted_leaves)
        on_disk = self._store, blob, size_bytes, partial.models, partial.leaves_by_model
        # Files deleted by hand meanwhile are made again: the disk is authoritative.
        if existing is None or not await asyncio.to_thread(has_partial, self._store, blob):
            was_quarantined = await asyncio.to_thread(create_partial, *on_disk)
        elif partial != before:
            await asyncio.to_thread(write_partial, *on_disk)
        arrivals.reserve_blob(blob, size_bytes, model, wanted_leaves)
        if was_quarantined:
            self._ledger.drop_quarantined(blob)
        await asyncio.to_thread(refresh_partial, self._store, blob, self._ledger)

    async def _with_known_hashes(self, manifest: Manifest) -> tuple[Manifest, dict[str, str]]:
        """Fill in the sha256 of small files that are here. Returns the manifest and these hashes by git name."""
        sha256_by_git_name: dict[str, str] = {}
        for f in manifest.files:
            if not f.sha256:
                sha256 = self._ledger.sha256_of(f.blob)
                if sha256 is None:
                    sha256 = await asyncio.to_thread(
                        find_by_git_sha1, self._store, f.git_sha1, f.size_bytes, self._ledger
                    )
                if sha256:
                    sha256_by_git_name[f.blob] = sha256
        files = [structs.replace(f, sha256=sha256_by_git_name.get(f.blob, f.sha256)) for f in manifest.files]
        return structs.replace(manifest, files=files), sha256_by_git_name

    async def release(self, request: Release) -> Empty:
        """End a reservation. Bytes that only it needed are deleted."""
        model, blobs = request.model, [check_blob(blob) for blob in request.blobs]
        check_commit(ModelRef.parse(model).revision)
        async with self._section:
            if model in self._ledger.stored_manifests:
                await self.deletions.end_reservation(model)
            elif model in self._ledger.shards:
                await self.shards.finish_shard(model)
            else:
                # A storage that was restarted remembers partial blobs only.
                self._ledger.arrivals.extend_reservation(model, blobs)
                await self.deletions.delete_model(model)
        await self._publisher.publish_storage()
        return Empty()

    async def commit(self, request: CommitBlob) -> CommittedBlob:
        """Verify a whole partial blob and commit it. Concurrent requests for one blob share the work."""
        blob = check_blob(request.blob)
        # Once begun it completes: half a commit would make the ledger wrong.
        return await self._committing(blob, lambda: run_to_completion(self._commit(blob, request.leaf_list_digest)))

    async def _commit(self, blob: str, leaf_list_digest: str) -> CommittedBlob:
        partial = self._ledger.arrivals.partials.get(blob)
        if partial is None:
            sha256 = self._ledger.sha256_by_git_name.get(blob, blob)
            if sha256 in self._ledger.blobs:
                size_bytes = self._ledger.blobs[sha256]
                digest = await asyncio.to_thread(
                    leaf_hash_file.read_leaf_list_digest, self._store.layout, sha256, size_bytes
                )
                return CommittedBlob(sha256=sha256, size_bytes=size_bytes, leaf_list_digest=digest)
            raise NotFound(f"blob {blob[:16]}… has no reservation; reserve it first")
        if not self._ledger.arrivals.is_reserved(partial):
            raise NotFound(
                f"the reservation of blob {blob[:16]}… has ended because nobody wanted it; reserve it again"
            )
        try:
            # Hashing takes seconds per GB, so it runs outside the section; nobody else writes this partial blob.
            digests = await asyncio.to_thread(verify_partial, self._store, blob, partial.size_bytes, leaf_list_digest)
        except FileNotFoundError:
            raise NotFound(f"the partial blob {blob[:16]}… is gone; reserve it again") from None
        except CorruptLeaves as e:
            async with self._section:
                self._require_unchanged(blob, partial)
                await asyncio.to_thread(clear_leaves, self._store.layout, blob, partial.size_bytes, e.leaves)
                await self.shards.drop_incomplete()
            raise
        except Corrupt:
            async with self._section:
                self._require_unchanged(blob, partial)
                await self.shards.discard_corrupt_partial(blob)
            raise
        async with self._section:
            self._require_unchanged(blob, partial)
            for model in self._ledger.arrivals.record_sha256(blob, digests.sha256):
                await asyncio.to_thread(self.metadata.write_reservation, model)
            await asyncio.to_thread(commit_blob, self._store, blob, digests)
            self._ledger.commit_blob(blob, digests.sha256, digests.size_bytes)
        await self._publisher.publish_storage()
        return CommittedBlob(
            sha256=digests.sha256,
            size_bytes=digests.size_bytes,
            leaf_list_digest=hash_leaf_list(digests.leaf_hashes),
        )

    def _require_unchanged(self, blob: str, verified: PartialBlobInfo) -> None:
        # Cancelled and reserved again while we hashed: its bytes are not those that were verified.
        if not self._ledger.arrivals.is_same_arrival(blob, verified):
            raise NotFound(f"the reservation of blob {blob[:16]}… was cancelled; reserve it again")

    async def seal(self, request: SealModel) -> ModelState:
        """Make a model present; all its blobs must be. Returns its published state."""
        manifest = request.manifest
        check_manifest(manifest)
        if not manifest.sealed:
            raise BadInput(f"the manifest of {manifest.model} is not sealed: some files have no sha256")
        async with self._section:
            if is_offered_by_library(manifest, self._ledger):
                # Everything requested is in a library, which offers it.
                await self.shards.drop(manifest.model)
                await self.deletions.end_reservation(manifest.model)
                return await self._publisher.publish_model(manifest)
            was_complete = manifest.model in self._ledger.manifests
            stored = self._ledger.stored_manifests.get(manifest.model)
            names = sorted({*manifest.revisions, *(stored.revisions if stored else [])})
            # A commit never changes: the sealed manifest stays, and only gains names and leaf list digests.
            manifest = structs.replace(stored or manifest, revisions=names)
            await asyncio.to_thread(self._store.require_present)
            await self._mark_missing(await asyncio.to_thread(self._store.missing_blobs, manifest))
            require_all_blobs(manifest, self._ledger)
            manifest = await asyncio.to_thread(leaf_hash_file.with_leaf_list_digests, self._store.layout, manifest)
            if manifest == stored:
                await asyncio.to_thread(link_view, self._store, manifest)
            else:
                await asyncio.to_thread(seal_model, self._store, manifest)
            await self.shards.drop(manifest.model)
            self._ledger.seal(manifest)
            await asyncio.to_thread(self.metadata.record_arrival, manifest.model)
            await self.deletions.end_reservation(manifest.model)
            state = await self._publisher.publish_model(manifest)
        await self._publisher.publish_storage()
        if not was_complete:
            await self._context.events.emit("model_ready", model=manifest.model, size_bytes=manifest.size_bytes)
        log.info("model ready", model=manifest.model, size_bytes=manifest.size_bytes)
        return state

    async def _mark_missing(self, blobs: list[str]) -> None:
        """Drop blobs that were deleted by hand meanwhile, and unpublish the models that need them."""
        for model in self._ledger.mark_missing(blobs, also_in_libraries=True):
            log.warning("model is incomplete, blobs were deleted; pull it again", model=model)
            await self._publisher.unpublish_model(model)

    async def manifest(self, request: GetManifest) -> Manifest:
        """Return the manifest of a complete model; with `include_incomplete` also of an incomplete one."""
        ref = ModelRef.parse(request.model)
        ledger = self._ledger
        manifests = (
            {**ledger.incomplete, **ledger.complete_manifests}
            if request.include_incomplete
            else ledger.complete_manifests
        )
        matches = matching_manifests(ref.repo, ref.revision, manifests.values())
        if not matches:
            raise NotFound(f"{ref} is not on node {self._context.node}")
        return await asyncio.to_thread(leaf_hash_file.with_leaf_list_digests, self._store.layout, matches[-1])

    # Settings and publishing

    def apply_settings(self, settings: StorageSettings) -> None:
        """Use these settings from now on. The next `publish` publishes them."""
        self.evictions.settings = settings
        self._publisher.apply_settings(settings)

    async def republish_after_reconnects(self) -> None:
        """Publish everything again after each reconnect: a NATS that comes back may have lost its store."""
        reconnects = self._context.nats.reconnects
        seen = reconnects.count
        while True:
            seen = await reconnects.wait_after(seen)
            await self._republish()

    async def republish_removed_keys(self) -> None:
        """Publish everything again whenever a published key is removed, as for a node retired while it lived."""
        while True:
            await self._publisher.wait_key_removed()
            log.warning("published state of this disk was removed; publishing again")
            await self._republish()

    async def _republish(self) -> None:
        try:
            async with self._section:
                await self._publisher.publish_all()
        except Unavailable as e:
            log.warning("cannot publish what the disk holds; retrying", reason=e.message)
            await asyncio.sleep(_REPUBLISH_RETRY_S)
