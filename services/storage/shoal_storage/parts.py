"""Parts: what stages with some layers need of a model that is not here whole (docs/sparse.md).

    parts/<org>--<name>@<commit>   {"manifest":{…},"layers":[[0,14]],"leaves":{"<sha256>":[[0,3],[7,8]]}}

Written durably once the small files are blobs, and each leaf that is needed of the others is durable in its partial
and was hashed against a leaf list whose root is sealed: what it says is verified, as what a manifest says (I1, I2).
The partials stay, reserved for those leaves; the promise of the model stands for as long as the part is there.

All that changes a part here happens under the guard's section.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal_common import leafset
from shoal_common.errors import BadInput, Corrupt, NotFound, ShoalError
from shoal_common.layout import LEAF_BYTES, Bitmap, Layout
from shoal_common.leaves import HASH_BYTES, leaf_hash, list_bytes, root_of
from shoal_common.logs import Log
from shoal_common.messages import Message, decode, encode
from shoal_common.messages.questions import SealPart
from shoal_common.messages.records import Manifest, PartState
from shoal_common.tensors import check_layers, union
from shoal_storage.announce import Announcer, part_state
from shoal_storage.decide import Ledger, Part, Partial, asked_leaves, check_manifest
from shoal_storage.disk import Disk
from shoal_storage.durable import make_directory, sync, write_file
from shoal_storage.keeping import Keeping, named

log = Log("parts")


class PartFile(Message):
    """`parts/<org>--<name>@<commit>`."""

    manifest: Manifest
    layers: list[list[int]]
    leaves: dict[str, list[list[int]]]


def _path(layout: Layout, model: str) -> Path:
    repo, _, commit = model.rpartition("@")
    return layout.part(repo, commit)


def write(layout: Layout, part: Part) -> None:
    """Remember a part, durably. Blocking."""
    path = _path(layout, part.manifest.model)
    make_directory(path.parent)
    ranges = {blob: leafset.ranges(leaves) for blob, leaves in part.leaves.items()}
    write_file(path, encode(PartFile(manifest=part.manifest, layers=part.layers, leaves=ranges)))


def remove(layout: Layout, model: str) -> None:
    """Forget a part, durably. Absent already is fine. Blocking."""
    path = _path(layout, model)
    if path.exists():
        path.unlink()
        sync(path.parent)


def read(disk: Disk, ledger: Ledger) -> dict[str, Part]:
    """At start: the parts that are here with all that they say. Of the others the records go. Blocking."""
    lay, found = disk.layout, dict[str, Part]()
    for model, path in named(lay.parts):
        try:
            part = _read(path, model)
            if model in ledger.on_disk:
                raise NotFound("the model itself is here")
            _require(part, ledger, disk)
        except (ShoalError, OSError) as e:
            log.warning("what was here of a model is not, or not all of it", model=model, why=str(e))
            remove(lay, model)
            continue
        found[model] = part
    return found


def _read(path: Path, model: str) -> Part:
    record = decode(path.read_bytes(), PartFile)
    check_manifest(record.manifest)
    sizes = record.manifest.blob_sizes
    if record.manifest.model != model or not record.leaves.keys() <= sizes.keys():
        raise BadInput("it is of another model, or of blobs that are not the model's")
    leaves = {b: leafset.of_ranges(ranges, sizes[b]) for b, ranges in record.leaves.items()}
    return Part(record.manifest, union(check_layers(run) for run in record.layers), leaves)


def _require(part: Part, ledger: Ledger, disk: Disk) -> dict[str, Partial]:
    """The partials that a part needs leaves of. Raises NotFound unless all that it needs is here and durable."""
    partials: dict[str, Partial] = {}
    for f in part.manifest.files:
        needed = part.leaves.get(f.blob)
        if ledger.bytes_of(f.blob) == f.size_bytes or needed == 0:
            continue
        partial = ledger.partials.get(f.blob)
        if needed is None or partial is None or partial.size_bytes != f.size_bytes:
            raise NotFound(f"{f.path} of {part.manifest.model} is not here; reserve it")
        if needed & ~disk.durable_leaves(f.blob, f.size_bytes):
            raise NotFound(f"of {f.path} of {part.manifest.model} leaves are missing; fetch them")
        partials[f.blob] = partial
    return partials


def lengthen(layout: Layout, blob: str, size_bytes: int) -> None:
    """Give a partial's data the blob's length, by a hole: who loads from it checks that. Blocking."""
    with (layout.partial(blob) / "data").open("r+b") as f:
        if os.fstat(f.fileno()).st_size < size_bytes:
            f.truncate(size_bytes)
            os.fsync(f.fileno())


def require_leaves(layout: Layout, blob: str, size_bytes: int, leaves: int, root: str) -> None:
    """Hash these leaves of a partial against its list, and the list against its root, which is sealed. Blocking.

    Raises NotFound when the list is not there, Corrupt when leaves are not what it says.
    """
    try:
        hashes = layout.partial_leaves(blob).read_bytes()
    except FileNotFoundError:
        hashes = b""
    if not root or len(hashes) != list_bytes(size_bytes) or root_of(hashes) != root:
        raise NotFound(f"the leaf list of blob {blob[:16]}… is not beside its partial; fetch it again")
    bad = 0
    sizes = Bitmap(size_bytes)
    with (layout.partial(blob) / "data").open("rb") as f:
        for first, last in leafset.ranges(leaves):
            f.seek(first * LEAF_BYTES)
            for leaf in range(first, last):
                found = leaf_hash(f.read(sizes.leaf_bytes(leaf)))
                bad += found != hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES]
    if bad:
        raise Corrupt(f"{bad} of the leaves that have arrived of blob {blob[:16]}… are not what its leaf list says")


class Parts:
    """Keeps `parts` of a ledger, their records and what the cluster is told of them alike."""

    def __init__(
        self, disk: Disk, ledger: Ledger, section: asyncio.Lock, keeping: Keeping, announcer: Announcer
    ) -> None:
        self._disk, self._ledger, self._section = disk, ledger, section
        self._keeping, self._announcer = keeping, announcer

    async def seal(self, question: SealPart) -> PartState:
        """What was fetched for some layers is here: check it, remember it, announce it."""
        manifest = question.manifest
        check_manifest(manifest)
        if not manifest.sealed:
            raise BadInput(f"the manifest of {manifest.model} is not sealed: it lacks the sha256 of some files")
        layers = union(check_layers(run) for run in question.layers)
        async with self._section:
            before = self._ledger.parts.get(manifest.model)
            names = sorted({*manifest.revisions, *(before.manifest.revisions if before else [])})
            manifest = msgspec.structs.replace(manifest, revisions=names)
            leaves = asked_leaves(manifest, question.leaves, self._ledger)
            part = Part(manifest, union([*layers, *(before.layers if before else [])]), leaves)
            partials = await asyncio.to_thread(_require, part, self._ledger, self._disk)
        # Hashing takes a while: outside the section. Leaves that are durable are not written again.
        for blob, partial in partials.items():
            fresh = leaves[blob] & ~self._ledger.part_leaves(blob)
            root = question.roots.get(blob, "")
            try:
                await asyncio.to_thread(require_leaves, self._disk.layout, blob, partial.size_bytes, fresh, root)
            except FileNotFoundError:
                raise NotFound(f"the partial of {blob[:16]}… has gone; reserve it again") from None
            except Corrupt:
                async with self._section:
                    if self._ledger.partials.get(blob) is partial:
                        await self.discard(blob, partial)
                raise
        async with self._section:
            again = await asyncio.to_thread(_require, part, self._ledger, self._disk)
            if any(again[blob] is not partials.get(blob) for blob in again):
                raise NotFound(f"a reservation of {manifest.model} was withdrawn; reserve it again")
            if self._ledger.parts.get(manifest.model) is not before:
                raise NotFound(f"what is here of {manifest.model} has changed; reserve it again")
            for blob, partial in again.items():
                await asyncio.to_thread(lengthen, self._disk.layout, blob, partial.size_bytes)
            await asyncio.to_thread(write, self._disk.layout, part)
            self._ledger.parts[manifest.model] = part
            self._ledger.promised[manifest.model] = set(manifest.blob_sizes)
            await asyncio.to_thread(self._keeping.promise, manifest.model)
            if not any(manifest.model in p.models - p.leaves.keys() for p in self._ledger.partials.values()):
                await self.settle(manifest.model)  # else another download brings all of it
            await asyncio.to_thread(self._keeping.came_in, manifest.model)
            await self._announcer.announce_part(part)
        await self._announcer.publish()
        log.info("a part is ready", model=manifest.model, layers=str(part.layers), size_bytes=part.size_bytes)
        return part_state(self._announcer.node, part)

    async def settle(self, model: str) -> None:
        """No more of a model comes in than the part that is here: its partials promise that and no more."""
        part = self._ledger.parts[model]
        for blob, partial in self._ledger.partials.items():
            if model in partial.models and partial.leaves.get(model) != (needed := part.leaves.get(blob, 0)):
                changed = partial.wanted_by(model, needed)
                await asyncio.to_thread(
                    self._disk.write_partial, blob, partial.size_bytes, changed.models, changed.leaves
                )
                partial.leaves = changed.leaves
            if partial.leaves:
                await asyncio.to_thread(self._disk.look_at, blob, partial)

    async def require(self, part: Part) -> None:
        """Look that all of a part is here still; drop it and raise NotFound when somebody took leaves of it away."""
        try:
            await asyncio.to_thread(_require, part, self._ledger, self._disk)
        except NotFound as e:
            log.warning("a part is not here any more, or not all of it", model=part.manifest.model, why=e.message)
            await self.drop(part.manifest.model)
            raise

    async def drop_lost(self) -> bool:
        """Drop every part of which not all is here any more. Whether there was one. Within the section."""
        before = len(self._ledger.parts)
        for part in list(self._ledger.parts.values()):
            with suppress(NotFound):
                await self.require(part)
        return len(self._ledger.parts) < before

    async def drop(self, model: str) -> None:
        """A part is none any more: the model is whole, or goes. Nothing happens when there is none."""
        if model in self._ledger.parts:
            await asyncio.to_thread(remove, self._disk.layout, model)
            del self._ledger.parts[model]
            await self._announcer.take_back_part(model)

    async def discard(self, blob: str, partial: Partial) -> None:
        """The bytes of a partial are wrong: all of them go, and come anew for whom they are reserved."""
        for model in [m for m, part in self._ledger.parts.items() if part.leaves.get(blob)]:
            log.warning("a part has lost leaves", model=model, blob=blob)
            await self.drop(model)
        await asyncio.to_thread(self._disk.remove_partial, blob)
        await asyncio.to_thread(self._disk.write_partial, blob, partial.size_bytes, partial.models, partial.leaves)
        await asyncio.to_thread(self._disk.look_at, blob, partial)
