"""The guard: one critical section around the ledger and the disk, and what the cluster is told of them."""

from __future__ import annotations

import asyncio
import time

from msgspec import structs

from shoal_common.errors import BadInput, Corrupt, NotFound, Unavailable
from shoal_common.leaves import root_of
from shoal_common.logs import Log
from shoal_common.messages.questions import (
    AskManifest,
    CommitBlob,
    Committed,
    Done,
    Release,
    Reserve,
    Reserved,
    SealModel,
)
from shoal_common.messages.records import Manifest, ModelState
from shoal_common.names import ModelRef, check_blob
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_storage import leaves
from shoal_storage.announce import Announcer
from shoal_storage.decide import (
    Ledger,
    Limits,
    Partial,
    asked_leaves,
    check_manifest,
    is_offered,
    matching,
    promised_leaves,
)
from shoal_storage.disk import Disk, require_present
from shoal_storage.evict import as_told
from shoal_storage.holders import Holders
from shoal_storage.keeping import Keeping
from shoal_storage.listed import BadLeaves, forget
from shoal_storage.parts import Parts
from shoal_storage.removal import Removal
from shoal_storage.repair import make_partial
from shoal_storage.room import Room
from shoal_storage.uses import Uses

log = Log("storage")

_SAY_AGAIN_S = 5.0
"""When what the disk holds could not be said, it is tried again after this."""


class Guard:
    """Storage of one node. Every change of the ledger happens under `_section`."""

    def __init__(
        self, context: Context, disk: Disk, ledger: Ledger, limits: Limits, specs: View, announcer: Announcer
    ) -> None:
        self._context, self._disk, self._ledger = context, disk, ledger
        self._announcer = announcer
        self._section = asyncio.Lock()
        self.keeping = Keeping(disk.layout, ledger)
        self.parts = Parts(disk, ledger, self._section, self.keeping, announcer)
        self.holders = Holders(context, disk, ledger, self._section, self.parts, announcer)
        uses = Uses(context, specs, ledger, self.holders.look)
        self.removal = Removal(context, disk, ledger, self._section, self.keeping, self.parts, announcer, uses)
        self.room = Room(context, disk, ledger, limits, uses, announcer, self.removal.remove)
        self._committing: dict[str, asyncio.Task[Committed]] = {}

    @property
    def section(self) -> asyncio.Lock:
        """What the ledger and the disk are changed under."""
        return self._section

    # Questions

    async def reserve(self, question: Reserve) -> Reserved:
        """Approve a fetch and promise its bytes, or raise QuotaExceeded."""
        check_manifest(question.manifest)
        async with self._section:
            manifest, known = await self._with_known(question.manifest)
            sizes, promised = manifest.blob_sizes, self._ledger.promised
            asked = asked_leaves(manifest, question.leaves, self._ledger)
            wanted = promised_leaves(manifest.model, asked, self._ledger)
            before = promised.get(manifest.model)
            # Promised first: what is here of it already does not go to make room for the rest.
            promised[manifest.model] = set(sizes)
            try:
                admission, evicted = await self.room.admit(manifest, wanted)
                if promised[manifest.model] != before:
                    await asyncio.to_thread(self.keeping.promise, manifest.model)
                for blob in admission.missing:
                    await self._promise(blob, sizes[blob], manifest.model, wanted.get(blob), admission.roots[blob])
                self._ledger.ended.discard(manifest.model)
                await asyncio.to_thread(self.keeping.wanted, manifest.model, time.time())
            except BaseException:
                if before is None:
                    del promised[manifest.model]
                else:
                    promised[manifest.model] = before
                raise
        await self._announcer.publish()
        log.info(
            "reserved", model=manifest.model, needed_bytes=admission.needed_bytes, present=len(admission.present)
        )
        told = as_told(evicted) if evicted else None
        return Reserved(present=admission.present, missing=admission.missing, known=known, evicted=told)

    async def _promise(self, blob: str, size_bytes: int, model: str, wanted: int | None, further: str) -> None:
        known = self._ledger.partials.get(blob)
        if known is None:
            await asyncio.to_thread(self._disk.place, blob, further)
        partial = known or Partial(size_bytes)
        changed = partial.wanted_by(model, wanted)
        models = changed.models
        # Files removed by hand while we ran are made again: the disk is the truth.
        if known is None or not await asyncio.to_thread(self._disk.has_partial, blob):
            if await asyncio.to_thread(make_partial, self._disk, blob, size_bytes, models, changed.leaves):
                self._ledger.quarantined.discard(blob)
                self._ledger.repairable.pop(blob, None)
        elif (models, changed.leaves) != (partial.models, partial.leaves):
            await asyncio.to_thread(self._disk.write_partial, blob, size_bytes, models, changed.leaves)
        partial.models, partial.leaves = models, changed.leaves
        await asyncio.to_thread(self._disk.look_at, blob, partial)
        self._ledger.partials[blob] = partial

    async def _with_known(self, manifest: Manifest) -> tuple[Manifest, dict[str, str]]:
        """A manifest with the sha256 of those small files that are here already."""
        known: dict[str, str] = {}
        for f in manifest.files:
            if not f.sha256:
                found = self._ledger.git.get(f.blob)
                if found not in self._ledger.blobs:
                    found = self._ledger.adopted_git.get(f.blob)
                if found is None:
                    found = await asyncio.to_thread(self._disk.find_git, f.git_sha1, f.size_bytes, self._ledger)
                if found:
                    known[f.blob] = found
        files = [structs.replace(f, sha256=known.get(f.blob, f.sha256)) for f in manifest.files]
        return structs.replace(manifest, files=files), known

    async def release(self, question: Release) -> Done:
        """End a reservation. Bytes that only it wanted are removed."""
        check_manifest(question.manifest)
        async with self._section:
            manifest, _ = await self._with_known(question.manifest)
            model = manifest.model
            if model in self._ledger.on_disk:
                await self.removal.end_promise(model)
            elif model in self._ledger.parts:
                await self.parts.settle(model)
            else:
                self._ledger.promised.setdefault(model, set()).update(manifest.blob_sizes)
                await self.removal.remove(model)
        await self._announcer.publish()
        return Done()

    async def commit(self, question: CommitBlob) -> Committed:
        """Verify all of a partial and make it a blob. Asked by several fetches at once, it is done once."""
        blob = check_blob(question.blob)
        task = self._committing.get(blob)
        if task is None:
            task = asyncio.create_task(self._commit(blob, question.root))
            self._committing[blob] = task
            task.add_done_callback(lambda _: self._committing.pop(blob, None))
        return await asyncio.shield(task)

    async def _commit(self, blob: str, root: str) -> Committed:
        partial = self._ledger.partials.get(blob)
        if partial is None:
            sha256 = self._ledger.git.get(blob, blob)
            if sha256 in self._ledger.blobs:
                size_bytes = self._ledger.blobs[sha256]
                found = await asyncio.to_thread(leaves.root, self._disk.layout, sha256, size_bytes)
                return Committed(sha256=sha256, size_bytes=size_bytes, root=found)
            raise NotFound(f"blob {blob[:16]}… has no reservation here; reserve it first")
        if not self._ledger.promises(partial):
            raise NotFound(f"the reservation of blob {blob[:16]}… has ended: nobody wanted it; reserve it again")
        try:
            # Hashing takes seconds per GB: outside the critical section, nobody else writes this partial.
            digests = await asyncio.to_thread(self._disk.verify_partial, blob, partial.size_bytes, root)
        except FileNotFoundError:
            raise NotFound(f"the partial of {blob[:16]}… has gone; reserve it again") from None
        except BadLeaves as e:
            async with self._section:
                self._require_same(blob, partial)
                await asyncio.to_thread(forget, self._disk.layout, blob, partial.size_bytes, e.leaves)
                await self.parts.drop_lost()
            raise
        except Corrupt:
            async with self._section:
                self._require_same(blob, partial)
                await self.parts.discard(blob, partial)
            raise
        async with self._section:
            self._require_same(blob, partial)
            for model, promised in self._ledger.promised.items():
                if blob in promised and digests.sha256 not in promised:
                    promised.add(digests.sha256)
                    await asyncio.to_thread(self.keeping.promise, model)
            await asyncio.to_thread(self._disk.commit, blob, digests)
            del self._ledger.partials[blob]
            self._ledger.blobs[digests.sha256] = digests.size_bytes
            self._ledger.unproven.pop(digests.sha256, None)
            self._ledger.wrong.pop(digests.sha256, None)
            self._ledger.quarantined.discard(digests.sha256)
            self._ledger.repairable.pop(digests.sha256, None)
            if blob != digests.sha256:
                self._ledger.git[blob] = digests.sha256
        await self._announcer.publish()
        return Committed(sha256=digests.sha256, size_bytes=digests.size_bytes, root=root_of(digests.leaves))

    def _require_same(self, blob: str, verified: Partial) -> None:
        # Withdrawn and reserved anew while we hashed: that one's bytes are not those that were verified.
        if self._ledger.partials.get(blob) is not verified:
            raise NotFound(f"the reservation of blob {blob[:16]}… was withdrawn; reserve it again")

    async def seal(self, question: SealModel) -> ModelState:
        """Make a model present: all its blobs are. Returns what the cluster is told of it."""
        manifest = question.manifest
        check_manifest(manifest)
        if not manifest.sealed:
            raise BadInput(f"the manifest of {manifest.model} is not sealed: it lacks the sha256 of some files")
        async with self._section:
            if is_offered(manifest, self._ledger):
                # All that was wanted is in a read-only root, and offered from there.
                await self.parts.drop(manifest.model)
                await self.removal.end_promise(manifest.model)
                return await self._announcer.announce(manifest)
            whole = manifest.model in self._ledger.manifests
            held = self._ledger.on_disk.get(manifest.model)
            names = sorted({*manifest.revisions, *(held.revisions if held else [])})
            # A commit never changes: what was sealed stands, and only gains names, and roots of its lists.
            manifest = structs.replace(held or manifest, revisions=names)
            await asyncio.to_thread(self._disk.require_there)
            for sha256 in await asyncio.to_thread(self._disk.lost, manifest):
                self._ledger.blobs.pop(sha256, None)  # removed by hand while we ran
                self._ledger.adopted_blobs.pop(sha256, None)
            require_present(manifest, self._ledger)
            manifest = await asyncio.to_thread(leaves.with_roots, self._disk.layout, manifest)
            if manifest == held:
                await asyncio.to_thread(self._disk.build_view, manifest)
            else:
                await asyncio.to_thread(self._disk.seal, manifest)
            await self.parts.drop(manifest.model)
            self._ledger.manifests[manifest.model] = manifest
            self._ledger.broken.pop(manifest.model, None)
            self._ledger.leaving.pop(manifest.model, None)  # it is here again: a start drops the tomb
            await asyncio.to_thread(self.keeping.came_in, manifest.model)
            await self.removal.end_promise(manifest.model)
            state = await self._announcer.announce(manifest)
        await self._announcer.publish()
        if not whole:
            await self._context.events.tell("model_ready", model=manifest.model, size_bytes=manifest.size_bytes)
        log.info("model is ready", model=manifest.model, size_bytes=manifest.size_bytes)
        return state

    async def manifest(self, question: AskManifest) -> Manifest:
        """The manifest of a model held here, whole; or broken too, for who repairs it."""
        ref = ModelRef.parse(question.model)
        ledger = self._ledger
        held = {**ledger.broken, **ledger.whole} if question.broken else ledger.whole
        found = matching(ref.repo, ref.revision, held.values())
        if not found:
            raise NotFound(f"{ref} is not on node {self._context.node}")
        return await asyncio.to_thread(leaves.with_roots, self._disk.layout, found[-1])

    # Around

    def use_limits(self, limits: Limits) -> None:
        """From now on these settings hold. The next `publish` tells the cluster."""
        self.room.limits = limits
        self._announcer.use_limits(limits)

    async def say_again_after_reconnects(self) -> None:
        """A NATS that comes back may have lost its store, and with it what we said."""
        reconnects = self._context.nats.reconnects
        seen = reconnects.count
        while True:
            seen = await reconnects.wait_after(seen)
            await self._say_again()

    async def say_again_what_is_taken(self) -> None:
        """A node that was retired while it lived says again what it has."""
        while True:
            await self._announcer.taken()
            log.warning("what was said of this disk has been removed; it is said again")
            await self._say_again()

    async def _say_again(self) -> None:
        try:
            async with self._section:
                await self._announcer.announce_all()
        except Unavailable as e:
            log.warning("what the disk holds could not be said again", why=e.message)
            await asyncio.sleep(_SAY_AGAIN_S)
