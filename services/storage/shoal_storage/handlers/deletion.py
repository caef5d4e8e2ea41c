"""Deletes models on request, and what ended fetches leave behind. Only storage deletes."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from shoal_common.errors import InternalError, InUse, Refused
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import Delete
from shoal_common.names import ModelRef
from shoal_common.service import ServiceContext
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.integrity.consequences import drop_obsolete_quarantine
from shoal_storage.leases.last_use import UsageView
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import arriving_models, blobs_freed_by, matching_manifests
from shoal_storage.ledger.usage import join_names, release_hint
from shoal_storage.publisher import StatePublisher
from shoal_storage.shards import ShardService
from shoal_storage.store.library_records import build_view
from shoal_storage.store.partials import allocated_bytes, delete_partial, refresh_partial, write_partial
from shoal_storage.store.store import Store
from shoal_storage.store.tombstones import begin_delete, finish_delete

log = StructuredLogger("storage")

DELETE_DEADLINE_S = 60.0
_FETCHER_RESTART_WAIT_S = 8.0
_LEAVING_DEADLINE_S = 10.0
"""How long to wait for ending stages; longer than a stage is given to stop."""
_LEAVING_POLL_S = 0.1


class DeletionService:
    """Deletes models from disk and ledger."""

    def __init__(
        self,
        context: ServiceContext,
        store: Store,
        ledger: Ledger,
        section: asyncio.Lock,
        metadata: MetadataFiles,
        shards: ShardService,
        publisher: StatePublisher,
        usage: UsageView,
    ) -> None:
        self._context, self._store, self._ledger, self._section = context, store, ledger, section
        self._metadata, self._shards, self._publisher, self._usage = metadata, shards, publisher, usage

    async def delete_model(self, model: str) -> int:
        """Delete a model, complete, incomplete or arriving, with the blobs that only it needs. Returns bytes freed.

        After an OSError the model is either complete and published, or neither and in `deleting`; then call it again.
        """
        ledger = self._ledger
        await self._shards.drop(model)
        repo, _, commit = model.rpartition("@")
        await asyncio.to_thread(begin_delete, self._store, repo, commit)
        manifest = ledger.begin_deletion(model)
        # Also blobs that are not here: their leaf hashes may be, and an earlier attempt may not have been durable.
        deletable = ledger.blobs.keys() | (
            manifest.blob_sizes.keys() - ledger.unverified.keys() if manifest else set()
        )
        leaving = [blob for blob in blobs_freed_by(model, ledger) if blob in deletable]
        try:
            await asyncio.to_thread(finish_delete, self._store, repo, commit, leaving)
            await asyncio.to_thread(self._metadata.delete_records, model)
        finally:
            freed = sum(
                ledger.drop_blob(blob) for blob in await asyncio.to_thread(self._store.missing_files, leaving)
            )
            if model in ledger.deleting:
                await self._publisher.unpublish_model(model)
        ledger.end_deletion(model)
        freed += await self.end_reservation(model)
        await drop_obsolete_quarantine(self._store, self._ledger)
        if offered := self._ledger.offered_library_models.get(model):
            with suppress(OSError):  # logged and retried where the model is unpublished
                await asyncio.to_thread(build_view, self._store.layout, offered)
        return freed

    async def delete_abandoned(self, model: str) -> int:
        """Delete what an ended download left. A model that is here stays. Returns bytes freed."""
        return await (
            self.end_reservation(model) if model in self._ledger.stored_manifests else self.delete_model(model)
        )

    async def end_reservation(self, model: str) -> int:
        """End a model's reservation and delete partial blobs that only it wanted. Returns the bytes they occupied."""
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

    async def delete(self, command: Delete, _: str) -> dict[str, object]:
        """Delete a model from this node: its download request first, then its manifest, then its bytes."""
        ref = ModelRef.parse(command.model)
        revision = ref.revision if "@" in command.model else ""
        self._refuse_if_in_library(ref.repo, revision)
        await self._wait_for_ending_stages(ref.repo, revision)
        await self._context.rpc(
            "fetcher",
            self._context.node,
            "stop_downloads",
            StopDownloads(repo=ref.repo, revision=revision),
            Empty,
            deadline_s=DELETE_DEADLINE_S / 2,
            restart_wait_s=_FETCHER_RESTART_WAIT_S,
        )
        # Once begun it completes, even past the command's deadline: half a deletion would make the ledger wrong.
        return await self._context.detached.run(self._delete(ref, revision))

    async def _delete(self, ref: ModelRef, revision: str) -> dict[str, object]:
        freed = 0
        try:
            async with self._section:
                await self._refuse_if_used(ref.repo, revision)
                manifests = self._removable(ref.repo, revision)
                for manifest in manifests:
                    freed += await self._remove_or_explain(manifest.model)
                    await self._context.events.emit("model_deleted", model=manifest.model)
                for model in arriving_models(ref.repo, revision, self._ledger):
                    freed += await self._remove_or_explain(model)
        finally:
            await self._publisher.publish_storage()
        log.info("model deleted", model=str(ref), found=len(manifests), freed_bytes=freed)
        return {"deleted": bool(manifests), "models": [m.model for m in manifests], "freed_bytes": freed}

    def _removable(self, repo: str, revision: str) -> list[Manifest]:
        """Return what is here of a revision, and what failed deletions left of it."""
        return matching_manifests(repo, revision, {**self._ledger.deleting, **self._ledger.local_manifests}.values())

    async def _remove_or_explain(self, model: str) -> int:
        try:
            return await self.delete_model(model)
        except OSError as e:
            refusal = f"the disk refuses it ({e.strerror}: {e.filename})"
            if model in self._ledger.local_manifests:
                raise InternalError(f"{model} was not deleted from node {self._context.node}: {refusal}") from e
            raise InternalError(
                f"{model} is no longer on node {self._context.node}, but not all of its files are gone: {refusal}. "
                "Delete it again when the disk allows it; storage also tries at its next start"
            ) from e

    async def _wait_for_ending_stages(self, repo: str, revision: str) -> None:
        """Raise InUse while the revision is in use, but wait for the stages of stopped instances, which end soon."""
        deadline_s = asyncio.get_running_loop().time() + _LEAVING_DEADLINE_S
        waited = False
        while True:
            try:
                async with self._section:
                    await self._refuse_if_used(repo, revision)
                return
            except InUse as e:
                if not e.details.get("leaving") or asyncio.get_running_loop().time() > deadline_s:
                    raise
                if not waited:
                    log.info("waiting for ending stages", model=repo, users=",".join(e.details["users"]))
            waited = True
            await asyncio.sleep(_LEAVING_POLL_S)

    def _refuse_if_in_library(self, repo: str, revision: str) -> None:
        if self._removable(repo, revision):
            return  # the store's copy can be deleted
        for manifest in matching_manifests(repo, revision, self._ledger.complete_manifests.values()):
            library_model = self._ledger.libraries.models[manifest.model]
            raise Refused(
                f"{manifest.model} is not in the store of node {self._context.node} but in a library, at "
                f"{library_model.directory}, where Shoal deletes nothing: remove it there, or remove the library "
                f"{library_model.library} with `shoal storage set --remove-library`",
                directory=library_model.directory,
            )

    async def _refuse_if_used(self, repo: str, revision: str) -> None:
        manifests = matching_manifests(repo, revision, self._ledger.local_manifests.values())
        if not manifests:
            return
        for manifest in manifests:
            if manifest.model in self._ledger.uses.pinned:
                raise InUse(
                    f"{manifest.model} is pinned on node {self._context.node}: "
                    f"`shoal storage unpin {manifest.model}` releases it"
                )
        users_by_model = await self._usage.current_users()  # counts an instance that was placed a moment ago (I4)
        users = [user for manifest in manifests for user in users_by_model.get(manifest.model, [])]
        if users:
            instances = list(dict.fromkeys(user.instance for user in users if user.instance))
            raise InUse(
                f"{repo} on node {self._context.node} is used by {join_names(users)}: {release_hint(users)}",
                users=[user.description for user in users],
                leaving=all(user.is_ending for user in users),
                **({"instance": instances[0], "instances": instances} if instances else {}),
            )
