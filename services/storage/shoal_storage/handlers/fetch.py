"""The fetch API: reserve, release, commit, seal and manifest, in one critical section over ledger and disk."""

from __future__ import annotations

import asyncio
import time

from msgspec import structs

from shoal_common.bus.kv_mirror import View
from shoal_common.errors import BadInput, Corrupt, NotFound, Unavailable
from shoal_common.logs import Log
from shoal_common.messages.envelope import Done
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import (
    AskManifest,
    CommitBlob,
    Committed,
    ModelState,
    Release,
    Reserve,
    Reserved,
    SealModel,
)
from shoal_common.names import ModelRef, check_blob
from shoal_common.service import Context
from shoal_common.store.leaf_hash import root_of
from shoal_storage.admission.admission import asked_leaves, promised_leaves
from shoal_storage.admission.manifest_check import check_manifest
from shoal_storage.eviction.executor import Room
from shoal_storage.eviction.planner import as_told
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.leaf_list_verify import BadLeaves, forget
from shoal_storage.files.metadata_files import Keeping
from shoal_storage.handlers.deletion import Removal
from shoal_storage.integrity.repair import make_partial
from shoal_storage.leases.last_use import Uses
from shoal_storage.leases.service import Holders
from shoal_storage.ledger.entries import Partial
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import is_offered, matching
from shoal_storage.publisher import Announcer
from shoal_storage.settings import Limits
from shoal_storage.shards import Parts
from shoal_storage.store.store import Disk, require_present

log = Log("storage")

_REPUBLISH_RETRY_S = 5.0
"""Delay before another attempt to publish what the disk holds."""


class Guard:
    """Handles a node's fetch requests. Every change of the ledger happens under `_section`."""

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
        """The lock under which ledger and disk are changed."""
        return self._section

    # Requests

    async def reserve(self, question: Reserve) -> Reserved:
        """Approve a fetch and reserve its bytes, or raise QuotaExceeded."""
        check_manifest(question.manifest)
        async with self._section:
            manifest, known = await self._with_known_hashes(question.manifest)
            sizes, reservations = manifest.blob_sizes, self._ledger.promised
            requested = asked_leaves(manifest, question.leaves, self._ledger)
            wanted = promised_leaves(manifest.model, requested, self._ledger)
            before = reservations.get(manifest.model)
            # Reserved first, so that the model's own blobs are not evicted to make space for it.
            reservations[manifest.model] = set(sizes)
            try:
                admission, evicted = await self.room.admit(manifest, wanted)
                if reservations[manifest.model] != before:
                    await asyncio.to_thread(self.keeping.promise, manifest.model)
                for blob in admission.missing:
                    await self._reserve_blob(
                        blob, sizes[blob], manifest.model, wanted.get(blob), admission.roots[blob]
                    )
                self._ledger.ended.discard(manifest.model)
                await asyncio.to_thread(self.keeping.wanted, manifest.model, time.time())
            except BaseException:
                if before is None:
                    del reservations[manifest.model]
                else:
                    reservations[manifest.model] = before
                raise
        await self._announcer.publish()
        log.info(
            "space reserved",
            model=manifest.model,
            needed_bytes=admission.needed_bytes,
            present=len(admission.present),
        )
        eviction_plan = as_told(evicted) if evicted else None
        return Reserved(present=admission.present, missing=admission.missing, known=known, evicted=eviction_plan)

    async def _reserve_blob(self, blob: str, size_bytes: int, model: str, wanted: int | None, volume_id: str) -> None:
        known = self._ledger.partials.get(blob)
        if known is None:
            await asyncio.to_thread(self._disk.place, blob, volume_id)
        partial = known or Partial(size_bytes)
        changed = partial.wanted_by(model, wanted)
        models = changed.models
        # Files deleted by hand meanwhile are made again: the disk is authoritative.
        if known is None or not await asyncio.to_thread(self._disk.has_partial, blob):
            if await asyncio.to_thread(make_partial, self._disk, blob, size_bytes, models, changed.leaves):
                self._ledger.quarantined.discard(blob)
                self._ledger.repairable.pop(blob, None)
        elif (models, changed.leaves) != (partial.models, partial.leaves):
            await asyncio.to_thread(self._disk.write_partial, blob, size_bytes, models, changed.leaves)
        partial.models, partial.leaves = models, changed.leaves
        await asyncio.to_thread(self._disk.look_at, blob, partial)
        self._ledger.partials[blob] = partial

    async def _with_known_hashes(self, manifest: Manifest) -> tuple[Manifest, dict[str, str]]:
        """Fill in the sha256 of small files that are here. Returns the manifest and these hashes by git name."""
        known: dict[str, str] = {}
        for f in manifest.files:
            if not f.sha256:
                sha256 = self._ledger.git.get(f.blob)
                if sha256 not in self._ledger.blobs:
                    sha256 = self._ledger.adopted_git.get(f.blob)
                if sha256 is None:
                    sha256 = await asyncio.to_thread(self._disk.find_git, f.git_sha1, f.size_bytes, self._ledger)
                if sha256:
                    known[f.blob] = sha256
        files = [structs.replace(f, sha256=known.get(f.blob, f.sha256)) for f in manifest.files]
        return structs.replace(manifest, files=files), known

    async def release(self, question: Release) -> Done:
        """End a reservation. Bytes that only it needed are deleted."""
        check_manifest(question.manifest)
        async with self._section:
            manifest, _ = await self._with_known_hashes(question.manifest)
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
        """Verify a whole partial blob and commit it. Concurrent requests for one blob share the work."""
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
                digest = await asyncio.to_thread(leaf_hash_file.root, self._disk.layout, sha256, size_bytes)
                return Committed(sha256=sha256, size_bytes=size_bytes, root=digest)
            raise NotFound(f"blob {blob[:16]}… has no reservation; reserve it first")
        if not self._ledger.promises(partial):
            raise NotFound(
                f"the reservation of blob {blob[:16]}… has ended because nobody wanted it; reserve it again"
            )
        try:
            # Hashing takes seconds per GB, so it runs outside the section; nobody else writes this partial blob.
            digests = await asyncio.to_thread(self._disk.verify_partial, blob, partial.size_bytes, root)
        except FileNotFoundError:
            raise NotFound(f"the partial blob {blob[:16]}… is gone; reserve it again") from None
        except BadLeaves as e:
            async with self._section:
                self._require_unchanged(blob, partial)
                await asyncio.to_thread(forget, self._disk.layout, blob, partial.size_bytes, e.leaves)
                await self.parts.drop_lost()
            raise
        except Corrupt:
            async with self._section:
                self._require_unchanged(blob, partial)
                await self.parts.discard(blob, partial)
            raise
        async with self._section:
            self._require_unchanged(blob, partial)
            for model, reserved_blobs in self._ledger.promised.items():
                if blob in reserved_blobs and digests.sha256 not in reserved_blobs:
                    reserved_blobs.add(digests.sha256)
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

    def _require_unchanged(self, blob: str, verified: Partial) -> None:
        # Cancelled and reserved again while we hashed: its bytes are not those that were verified.
        if self._ledger.partials.get(blob) is not verified:
            raise NotFound(f"the reservation of blob {blob[:16]}… was cancelled; reserve it again")

    async def seal(self, question: SealModel) -> ModelState:
        """Make a model present; all its blobs must be. Returns its published state."""
        manifest = question.manifest
        check_manifest(manifest)
        if not manifest.sealed:
            raise BadInput(f"the manifest of {manifest.model} is not sealed: some files have no sha256")
        async with self._section:
            if is_offered(manifest, self._ledger):
                # Everything requested is in a library, which offers it.
                await self.parts.drop(manifest.model)
                await self.removal.end_promise(manifest.model)
                return await self._announcer.announce(manifest)
            was_complete = manifest.model in self._ledger.manifests
            held = self._ledger.on_disk.get(manifest.model)
            names = sorted({*manifest.revisions, *(held.revisions if held else [])})
            # A commit never changes: the sealed manifest stays, and only gains names and leaf list digests.
            manifest = structs.replace(held or manifest, revisions=names)
            await asyncio.to_thread(self._disk.require_there)
            for sha256 in await asyncio.to_thread(self._disk.lost, manifest):
                self._ledger.blobs.pop(sha256, None)  # deleted by hand meanwhile
                self._ledger.adopted_blobs.pop(sha256, None)
            require_present(manifest, self._ledger)
            manifest = await asyncio.to_thread(leaf_hash_file.with_roots, self._disk.layout, manifest)
            if manifest == held:
                await asyncio.to_thread(self._disk.build_view, manifest)
            else:
                await asyncio.to_thread(self._disk.seal, manifest)
            await self.parts.drop(manifest.model)
            self._ledger.manifests[manifest.model] = manifest
            self._ledger.broken.pop(manifest.model, None)
            self._ledger.leaving.pop(manifest.model, None)  # it is here again: a start deletes the tombstone
            await asyncio.to_thread(self.keeping.came_in, manifest.model)
            await self.removal.end_promise(manifest.model)
            state = await self._announcer.announce(manifest)
        await self._announcer.publish()
        if not was_complete:
            await self._context.events.tell("model_ready", model=manifest.model, size_bytes=manifest.size_bytes)
        log.info("model ready", model=manifest.model, size_bytes=manifest.size_bytes)
        return state

    async def manifest(self, question: AskManifest) -> Manifest:
        """Return the manifest of a complete model; with `broken`, of an incomplete one too, for a repair."""
        ref = ModelRef.parse(question.model)
        ledger = self._ledger
        held = {**ledger.broken, **ledger.whole} if question.broken else ledger.whole
        matches = matching(ref.repo, ref.revision, held.values())
        if not matches:
            raise NotFound(f"{ref} is not on node {self._context.node}")
        return await asyncio.to_thread(leaf_hash_file.with_roots, self._disk.layout, matches[-1])

    # Settings and publishing

    def use_limits(self, limits: Limits) -> None:
        """Use these settings from now on. The next `publish` publishes them."""
        self.room.limits = limits
        self._announcer.use_limits(limits)

    async def say_again_after_reconnects(self) -> None:
        """Publish everything again after each reconnect: a NATS that comes back may have lost its store."""
        reconnects = self._context.nats.reconnects
        seen = reconnects.count
        while True:
            seen = await reconnects.wait_after(seen)
            await self._republish()

    async def say_again_what_is_taken(self) -> None:
        """Publish everything again whenever a published key is removed, as for a node retired while it lived."""
        while True:
            await self._announcer.taken()
            log.warning("published state of this disk was removed; publishing again")
            await self._republish()

    async def _republish(self) -> None:
        try:
            async with self._section:
                await self._announcer.announce_all()
        except Unavailable as e:
            log.warning("cannot publish what the disk holds; retrying", reason=e.message)
            await asyncio.sleep(_REPUBLISH_RETRY_S)
