"""What goes: models that people delete, and what a fetch that has ended leaves. Only storage removes."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from shoal_common.errors import Failed, InUse, Refused
from shoal_common.logs import Log
from shoal_common.messages.commands import Delete
from shoal_common.messages.questions import Done, Withdraw
from shoal_common.messages.records import Manifest
from shoal_common.names import ModelRef
from shoal_common.service import Context
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger, arriving, freed_by, matching
from shoal_storage.disk import Disk
from shoal_storage.keeping import Keeping
from shoal_storage.links import show
from shoal_storage.losing import forget_useless
from shoal_storage.parts import Parts
from shoal_storage.users import how_to_end, words
from shoal_storage.uses import Uses

log = Log("storage")

DELETE_DEADLINE_S = 60.0
_WITHDRAW_PATIENCE_S = 8.0
_LEAVING_PATIENCE_S = 10.0
"""Longer than a stage is given to stop."""
_LEAVING_LOOK_S = 0.1


class Removal:
    """Takes models off disk and ledger."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        section: asyncio.Lock,
        keeping: Keeping,
        parts: Parts,
        announcer: Announcer,
        uses: Uses,
    ) -> None:
        self._context, self._disk, self._ledger, self._section = context, disk, ledger, section
        self._keeping, self._parts, self._announcer, self._uses = keeping, parts, announcer, uses
        self._deleting: set[asyncio.Task[dict[str, object]]] = set()

    async def remove(self, model: str) -> int:
        """Remove a model, whole, broken or on its way in, with what only it needs. Returns bytes freed.

        What the disk refuses, OSError, leaves it whole and announced, or neither: then it is in `leaving`, and this
        is to be called again.
        """
        ledger = self._ledger
        await self._parts.drop(model)
        repo, _, commit = model.rpartition("@")
        await asyncio.to_thread(self._disk.entomb, repo, commit)
        if manifest := ledger.manifests.pop(model, None) or ledger.broken.pop(model, None):
            ledger.leaving[model] = manifest
        manifest = ledger.leaving.get(model)
        # Those that are not here too: their leaves may be, and a first attempt may not have been durable.
        known = ledger.blobs.keys() | (manifest.blob_sizes.keys() - ledger.unproven.keys() if manifest else set())
        leaving = [blob for blob in freed_by(model, ledger) if blob in known]
        try:
            await asyncio.to_thread(self._disk.clear, repo, commit, leaving)
            await asyncio.to_thread(self._keeping.forget, model)
        finally:
            freed = sum(ledger.drop(blob) for blob in await asyncio.to_thread(self._disk.gone, leaving))
            if model in ledger.leaving:
                await self._announcer.take_back(model)
        ledger.leaving.pop(model, None)
        self._ledger.git = {git: sha256 for git, sha256 in self._ledger.git.items() if sha256 in self._ledger.blobs}
        freed += await self.end_promise(model)
        await forget_useless(self._disk, self._ledger)
        if offered := self._ledger.offered.get(model):
            with suppress(OSError):  # said, and tried again, where the model is taken back
                await asyncio.to_thread(show, self._disk.layout, offered)
        return freed

    async def remove_unfinished(self, model: str) -> int:
        """Remove what an ended download has left. A model that is here stays. Returns bytes freed."""
        return await (self.end_promise(model) if model in self._ledger.on_disk else self.remove(model))

    async def end_promise(self, model: str) -> int:
        """A model's fetch is over: partials that only it wanted go. Returns the bytes that they occupied."""
        await asyncio.to_thread(self._keeping.end_promise, model)
        freed = 0
        for blob, partial in list(self._ledger.partials.items()):
            if model not in partial.models:
                continue
            left = partial.without(model)
            if left.models:
                # On the disk too, or the next start would think that two still want it.
                try:
                    await asyncio.to_thread(
                        self._disk.write_partial, blob, partial.size_bytes, left.models, left.leaves
                    )
                except OSError as e:
                    # A full disk takes no file, and this path frees space. After a restart nobody wishes for this
                    # model, and its share in the promise ends for that.
                    log.warning("who wants a partial is known in memory only", blob=blob, why=e.strerror)
                partial.models, partial.leaves = left.models, left.leaves
                await asyncio.to_thread(self._disk.look_at, blob, partial)
            else:
                freed += await asyncio.to_thread(self._disk.allocated_bytes, blob, partial.size_bytes)
                await asyncio.to_thread(self._disk.remove_partial, blob)
                del self._ledger.partials[blob]
        return freed

    async def delete(self, command: Delete, _: str) -> dict[str, object]:
        """Remove a model from this node: the wish for it first, then its manifest, then its bytes."""
        ref = ModelRef.parse(command.model)
        revision = ref.revision if "@" in command.model else ""
        self._refuse_if_adopted(ref.repo, revision)
        await self._wait_for_leaving(ref.repo, revision)
        await self._context.ask(
            "fetcher",
            self._context.node,
            "withdraw",
            Withdraw(repo=ref.repo, revision=revision),
            Done,
            deadline_s=DELETE_DEADLINE_S / 2,
            patience_s=_WITHDRAW_PATIENCE_S,
        )
        # Once begun it is finished, though the command's deadline pass: half of it would make the ledger wrong.
        deleting = asyncio.create_task(self._delete(ref, revision))
        self._deleting.add(deleting)
        deleting.add_done_callback(self._deleting.discard)
        return await asyncio.shield(deleting)

    async def _delete(self, ref: ModelRef, revision: str) -> dict[str, object]:
        freed = 0
        try:
            async with self._section:
                await self._refuse_if_used(ref.repo, revision)
                found = self._removable(ref.repo, revision)
                for manifest in found:
                    freed += await self._remove_or_say(manifest.model)
                    await self._context.events.tell("model_deleted", model=manifest.model)
                for model in arriving(ref.repo, revision, self._ledger):
                    freed += await self._remove_or_say(model)
        finally:
            await self._announcer.publish()
        log.info("deleted", model=str(ref), found=len(found), freed_bytes=freed)
        return {"deleted": bool(found), "models": [m.model for m in found], "freed_bytes": freed}

    def _removable(self, repo: str, revision: str) -> list[Manifest]:
        """What is here of a revision, and what is left of it."""
        return matching(repo, revision, {**self._ledger.leaving, **self._ledger.here}.values())

    async def _remove_or_say(self, model: str) -> int:
        try:
            return await self.remove(model)
        except OSError as e:
            what = f"the disk refuses it ({e.strerror}: {e.filename})"
            if model in self._ledger.here:
                raise Failed(f"{model} was not deleted from node {self._context.node}: {what}") from e
            raise Failed(
                f"{model} is not on node {self._context.node} any more, but not all of its files are gone: {what}. "
                "Delete it again when the disk lets them go; a start of storage tries that too"
            ) from e

    async def _wait_for_leaving(self, repo: str, revision: str) -> None:
        """Refuse what is in use; but stages of an instance that was stopped end by themselves, in a moment."""
        give_up_s = asyncio.get_running_loop().time() + _LEAVING_PATIENCE_S
        waited = False
        while True:
            try:
                async with self._section:
                    await self._refuse_if_used(repo, revision)
                return
            except InUse as e:
                if not e.details.get("leaving") or asyncio.get_running_loop().time() > give_up_s:
                    raise
                if not waited:
                    log.info("waiting for stages that are ending", model=repo, users=",".join(e.details["users"]))
            waited = True
            await asyncio.sleep(_LEAVING_LOOK_S)

    def _refuse_if_adopted(self, repo: str, revision: str) -> None:
        if self._removable(repo, revision):
            return  # what the store has of it may go
        for manifest in matching(repo, revision, self._ledger.whole.values()):
            adopted = self._ledger.adopted[manifest.model]
            raise Refused(
                f"{manifest.model} is not in the store of node {self._context.node} but in a read-only root, at "
                f"{adopted.directory}, where Shoal removes nothing: remove it there, or take {adopted.root} out of "
                "read_only_roots with `shoal storage set`",
                directory=adopted.directory,
            )

    async def _refuse_if_used(self, repo: str, revision: str) -> None:
        held = matching(repo, revision, self._ledger.here.values())
        if not held:
            return
        for manifest in held:
            if manifest.model in self._ledger.pinned:
                raise InUse(
                    f"{manifest.model} is pinned on node {self._context.node}: "
                    f"`shoal storage unpin {manifest.model}` lets it go"
                )
        uses = await self._uses.now()  # an instance that was placed a moment ago counts (I4)
        users = [user for manifest in held for user in uses.get(manifest.model, [])]
        if users:
            instances = list(dict.fromkeys(user.instance for user in users if user.instance))
            raise InUse(
                f"{repo} on node {self._context.node} is used by {words(users)}: {how_to_end(users)}",
                users=[user.words for user in users],
                leaving=all(user.leaving for user in users),
                **({"instance": instances[0], "instances": instances} if instances else {}),
            )
