"""The command `delete`. Only storage deletes."""

from __future__ import annotations

import asyncio

from shoal_common.errors import InternalError, InUse, Refused
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import Delete
from shoal_common.names import ModelId, ModelRef
from shoal_storage.context import StorageContext
from shoal_storage.eviction.model_deleter import ModelDeleter
from shoal_storage.leases.last_use import UsageView
from shoal_storage.ledger.references import arriving_models, matching_manifests
from shoal_storage.ledger.usage import join_names, release_hint
from shoal_storage.section import Held

log = StructuredLogger("storage")

DELETE_DEADLINE_S = 60.0
_FETCHER_RESTART_WAIT_S = 8.0
_LEAVING_DEADLINE_S = 10.0
"""How long to wait for ending stages; longer than a stage is given to stop."""
_LEAVING_POLL_S = 0.1


class DeleteCommand:
    """Handles `delete`: refuses models in use, stops their downloads, and deletes them."""

    def __init__(self, context: StorageContext, deleter: ModelDeleter, usage: UsageView) -> None:
        self._context, self._service, self._ledger = context, context.service, context.ledger
        self._deleter, self._usage = deleter, usage

    async def delete(self, command: Delete, _: str) -> dict[str, object]:
        """Delete a model from this node: its download request first, then its manifest, then its bytes."""
        ref = ModelRef.parse(command.model)
        revision = ref.revision if "@" in command.model else ""
        self._refuse_if_in_library(ref.repo, revision)
        await self._wait_for_ending_stages(ref.repo, revision)
        await self._service.rpc(
            "fetcher",
            self._context.node,
            "stop_downloads",
            StopDownloads(repo=ref.repo, revision=revision),
            Empty,
            deadline_s=DELETE_DEADLINE_S / 2,
            restart_wait_s=_FETCHER_RESTART_WAIT_S,
        )
        # Once begun it completes, even past the command's deadline: half a deletion would make the ledger wrong.
        return await self._context.service.detached.run(self._delete(ref, revision))

    async def _delete(self, ref: ModelRef, revision: str) -> dict[str, object]:
        freed, deleted = 0, list[ModelId]()
        try:
            await self._usage.catch_up()
            async with self._context.section as held:
                await self._refuse_if_used(held, ref.repo, revision)
                manifests = self._removable(ref.repo, revision)
                for manifest in manifests:
                    freed += await self._remove_or_explain(held, manifest.model)
                    deleted.append(manifest.model)
                for model in arriving_models(ref.repo, revision, self._ledger):
                    freed += await self._remove_or_explain(held, model)
        finally:
            await self._context.publishing.publish()
            for model in deleted:
                await self._context.events.emit("model_deleted", model=model)
        log.info("model deleted", model=str(ref), found=len(manifests), freed_bytes=freed)
        return {"deleted": bool(manifests), "models": [m.model for m in manifests], "freed_bytes": freed}

    def _removable(self, repo: str, revision: str) -> list[Manifest]:
        """Return what is here of a revision, and what failed deletions left of it."""
        return matching_manifests(repo, revision, {**self._ledger.deleting, **self._ledger.local_manifests}.values())

    async def _remove_or_explain(self, held: Held, model: ModelId) -> int:
        try:
            return await self._deleter.delete_model(held, model)
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
                await self._usage.catch_up()
                async with self._context.section as held:
                    await self._refuse_if_used(held, repo, revision)
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

    async def _refuse_if_used(self, held: Held, repo: str, revision: str) -> None:
        manifests = matching_manifests(repo, revision, self._ledger.local_manifests.values())
        if not manifests:
            return
        for manifest in manifests:
            if manifest.model in self._ledger.uses.pinned:
                raise InUse(
                    f"{manifest.model} is pinned on node {self._context.node}: "
                    f"`shoal storage unpin {manifest.model}` releases it"
                )
        users_by_model = await self._usage.current_users(held)
        users = [user for manifest in manifests for user in users_by_model.get(manifest.model, [])]
        if users:
            instances = list(dict.fromkeys(user.instance for user in users if user.instance))
            raise InUse(
                f"{repo} on node {self._context.node} is used by {join_names(users)}: {release_hint(users)}",
                users=[user.description for user in users],
                leaving=all(user.is_ending for user in users),
                **({"instance": instances[0], "instances": instances} if instances else {}),
            )
