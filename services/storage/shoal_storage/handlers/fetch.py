"""The fetch API: reserve, release, commit, seal and manifest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from msgspec import structs

from shoal_common.concurrency.cancellation import run_to_completion
from shoal_common.concurrency.single_flight import SingleFlight
from shoal_common.errors import BadInput, Corrupt, NotFound
from shoal_common.identity.seals import SealedList
from shoal_common.logs import StructuredLogger
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import LeafListSeal, Manifest
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
from shoal_common.names import ModelId, ModelRef, check_blob, check_model_id
from shoal_common.store.bitmap import leaf_count
from shoal_common.store.leaf_hash import hash_leaf_list
from shoal_storage.admission.admission import Admission
from shoal_storage.admission.manifest_check import check_layout, check_manifest
from shoal_storage.context import StorageContext
from shoal_storage.eviction.executor import EvictionExecutor
from shoal_storage.eviction.model_deleter import ModelDeleter
from shoal_storage.eviction.planner import to_message
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.hashing import FileHashes
from shoal_storage.files.leaf_list_verify import CorruptLeaves, clear_leaves
from shoal_storage.integrity.repair import create_partial
from shoal_storage.ledger.entries import PartialBlobInfo
from shoal_storage.ledger.references import is_offered_by_library, matching_manifests
from shoal_storage.publisher import read_model_state
from shoal_storage.section import Held
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
from shoal_storage.store.seals import MIN_SEALED_LEAVES
from shoal_storage.store.views import delete_view

log = StructuredLogger("storage")


class FetchApi:
    """Handles a node's fetch requests."""

    def __init__(
        self, context: StorageContext, shards: ShardService, deleter: ModelDeleter, evictions: EvictionExecutor
    ) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._metadata, self._publishing = context.metadata, context.publishing
        self._shards, self._deleter, self._evictions = shards, deleter, evictions
        self._committing = SingleFlight[CommittedBlob]()

    # Requests

    async def reserve(self, request: Reserve) -> ReserveResult:
        """Approve a fetch and reserve its bytes, or raise QuotaExceeded."""
        check_manifest(request.manifest)
        check_layout(request.manifest, self._store.name_folding)
        # From its arrival on: a release that arrives later must find the reservation that it ends.
        async with self._evictions.turn:
            manifest, sha256_by_git_name = await self._with_known_hashes(request.manifest)

            async def reserve(held: Held, admission: Admission, leaves: Mapping[str, int]) -> None:
                await self._reserve(held, manifest, admission, leaves)

            admission, evicted = await self._evictions.admit(manifest, request.leaf_ranges, reserve)
        await self._publishing.publish_soon()
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

    async def _reserve(self, held: Held, manifest: Manifest, admission: Admission, leaves: Mapping[str, int]) -> None:
        model, sizes = manifest.model, manifest.blob_sizes
        with self._ledger.arrivals.reserving(model, sizes) as is_new:
            if is_new:
                await asyncio.to_thread(self._metadata.write_reservation, model)
            for blob in admission.missing:
                volume_id = admission.volume_by_blob[blob]
                await self._reserve_blob(held, blob, sizes[blob], model, leaves.get(blob), volume_id)
            await asyncio.to_thread(self._metadata.record_wanted, model, time.time())

    async def _reserve_blob(
        self, held: Held, blob: str, size_bytes: int, model: ModelId, wanted_leaves: int | None, volume_id: str
    ) -> None:
        held.require()
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
                    candidates = [blob for blob, size in self._ledger.blobs.items() if size == f.size_bytes]
                    sha256 = await asyncio.to_thread(find_by_git_sha1, self._store, f.git_sha1, candidates)
                if sha256:
                    sha256_by_git_name[f.blob] = sha256
        files = [structs.replace(f, sha256=sha256_by_git_name.get(f.blob, f.sha256)) for f in manifest.files]
        return structs.replace(manifest, files=files), sha256_by_git_name

    async def release(self, request: Release) -> Empty:
        """End a reservation. Bytes that only it needed are deleted."""
        model, blobs = check_model_id(request.model), [check_blob(blob) for blob in request.blobs]
        async with self._evictions.turn, self._context.section as held:
            if model in self._ledger.stored_manifests:
                await self._deleter.end_reservation(held, model)
            elif model in self._ledger.shards:
                await self._shards.finish_shard(held, model)
            else:
                # A storage that was restarted remembers partial blobs only.
                self._ledger.arrivals.extend_reservation(model, blobs)
                await self._deleter.delete_model(held, model)
        await self._publishing.publish_soon()
        return Empty()

    async def commit(self, request: CommitBlob) -> CommittedBlob:
        """Verify a whole partial blob and commit it. Concurrent requests for one blob share the work."""
        blob = check_blob(request.blob)
        # Once begun it completes: half a commit would make the ledger wrong.
        return await self._committing(blob, lambda: run_to_completion(self._commit(blob, request)))

    async def _commit(self, blob: str, request: CommitBlob) -> CommittedBlob:
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
        sealed = SealedList(blob, partial.size_bytes, request.leaf_list_digest)
        try:
            # Hashing takes seconds per GB, so it runs outside the section; nobody else writes this partial blob.
            digests = await asyncio.to_thread(self._verify, sealed, request.seal)
        except FileNotFoundError:
            raise NotFound(f"the partial blob {blob[:16]}… is gone; reserve it again") from None
        except CorruptLeaves as e:
            async with self._context.section as held:
                self._require_unchanged(blob, partial)
                await asyncio.to_thread(clear_leaves, self._store.layout, blob, partial.size_bytes, e.leaves)
                await self._shards.drop_incomplete(held)
            await self._publishing.publish_soon()
            raise
        except Corrupt:
            async with self._context.section as held:
                self._require_unchanged(blob, partial)
                await self._shards.discard_corrupt_partial(held, blob)
            await self._publishing.publish_soon()
            raise
        async with self._context.section as held:
            self._require_unchanged(blob, partial)
            for model in self._ledger.arrivals.record_sha256(blob, digests.sha256):
                await asyncio.to_thread(self._metadata.write_reservation, model)
            await asyncio.to_thread(self._context.seals.record, digests, request.seal)
            await asyncio.to_thread(commit_blob, self._store, blob, digests)
            self._ledger.commit_blob(blob, digests.sha256, digests.size_bytes)
        await self._publishing.publish_soon()
        return CommittedBlob(
            sha256=digests.sha256,
            size_bytes=digests.size_bytes,
            leaf_list_digest=hash_leaf_list(digests.leaf_hashes),
        )

    def _verify(self, sealed: SealedList, seal: LeafListSeal | None) -> FileHashes:
        """Hash a partial blob: by its list if that has a seal that counts here, else by sha256. Blocking."""
        digest = sealed.leaf_list_digest
        is_relayed = leaf_count(sealed.size_bytes) >= MIN_SEALED_LEAVES
        if digest and (reason := self._context.seals.refusal(seal, sealed) if is_relayed else "it is small"):
            log.info("leaf list does not count; hashing by sha256", blob=sealed.sha256, reason=reason)
            digest = ""
        return verify_partial(self._store, sealed.sha256, sealed.size_bytes, digest)

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
        try:
            async with self._context.section as held:
                if is_offered_by_library(manifest, self._ledger):
                    # Everything requested is in a library, which offers it.
                    await self._shards.drop(held, manifest.model)
                    await self._deleter.end_reservation(held, manifest.model)
                    was_complete, state = True, await asyncio.to_thread(read_model_state, self._context, manifest)
                else:
                    was_complete, state = await self._seal(held, manifest)
        except NotFound:
            await self._publishing.publish_soon()  # blobs are gone, and so may models be that need them
            raise
        self._context.model_ready.set()
        await self._publishing.publish(manifest.model)
        if not was_complete:
            await self._context.events.emit("model_ready", model=manifest.model, size_bytes=manifest.size_bytes)
        log.info("model ready", model=manifest.model, size_bytes=manifest.size_bytes)
        return state

    async def _seal(self, held: Held, manifest: Manifest) -> tuple[bool, ModelState]:
        """Write view and manifest. Returns whether the model was complete already, and its state to publish."""
        was_complete = manifest.model in self._ledger.manifests
        stored = self._ledger.stored_manifests.get(manifest.model)
        names = sorted({*manifest.revisions, *(stored.revisions if stored else [])})
        # A commit never changes: the sealed manifest stays, and only gains names and leaf list digests. One that the
        # hub has not confirmed is no more than a node's word.
        keeps = stored is not None and (not stored.unchecked_from or bool(manifest.unchecked_from))
        manifest = structs.replace(stored if stored and keeps else manifest, revisions=names)
        await asyncio.to_thread(self._store.require_present)
        if stored is not None and stored.blob_sizes != manifest.blob_sizes:
            await asyncio.to_thread(delete_view, self._store.layout.view(manifest.model), stored)
        missing = await asyncio.to_thread(self._store.missing_blobs, manifest)
        for model in self._ledger.mark_missing(missing, also_in_libraries=True):
            log.warning("model is incomplete, blobs were deleted; pull it again", model=model)
            self._publishing.notify(model)
        require_all_blobs(manifest, self._ledger)
        manifest = await asyncio.to_thread(leaf_hash_file.with_leaf_list_digests, self._store.layout, manifest)
        if manifest == stored:
            await asyncio.to_thread(link_view, self._store, manifest)
        else:
            await asyncio.to_thread(seal_model, self._store, manifest)
        await self._shards.drop(held, manifest.model)
        self._ledger.seal(manifest)
        await asyncio.to_thread(self._metadata.record_arrival, manifest.model)
        await self._deleter.end_reservation(held, manifest.model)
        return was_complete, await asyncio.to_thread(read_model_state, self._context, manifest)

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
        manifest = await asyncio.to_thread(leaf_hash_file.with_leaf_list_digests, self._store.layout, matches[-1])
        if manifest.model in ledger.offered_library_models:
            # What a library has of a commit is what somebody downloaded: the hub knows whether that is all of it.
            return structs.replace(manifest, unchecked_from=self._context.node)
        return manifest
