"""Shards: the layers of a model that stages need, where the whole model is not here (docs/sparse.md).

    shards/<org>--<name>@<commit>   {"manifest":{…},"layers":[[0,14]],"leaves":{"<sha256>":[[0,3],[7,8]]}}

Written durably once the small files are blobs, and each needed leaf of the other files is durable in its partial blob
and was hashed against a leaf list with a sealed digest. So its contents are verified, like a manifest's (I1, I2). The
partial blobs stay, reserved for those leaves; the model's reservation lasts as long as the shard.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal_common.errors import BadInput, Corrupt, NotFound, Refused, ShoalError
from shoal_common.identity.seals import SealedList
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct, decode, encode
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import SealShard, ShardState
from shoal_common.models.layer_tensors import check_layers, union
from shoal_common.names import ModelId
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.leaf_hash import HASH_BYTES, hash_leaf_list, leaf_hash, leaf_list_size
from shoal_common.store.store_paths import StorePaths
from shoal_storage.admission.admission import requested_leaves
from shoal_storage.admission.manifest_check import check_manifest
from shoal_storage.context import StorageContext
from shoal_storage.files.atomic_file import fsync_path, make_directory, replace_file
from shoal_storage.files.metadata_files import iter_model_files
from shoal_storage.ledger.entries import PartialBlobInfo, Shard
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.publisher import shard_state
from shoal_storage.section import Held
from shoal_storage.store.partials import delete_partial, durable_leaves, refresh_partial, write_partial
from shoal_storage.store.store import Store

log = StructuredLogger("parts")


class ShardFile(WireStruct):
    """`shards/<org>--<name>@<commit>`."""

    manifest: Manifest
    layers: list[list[int]]
    leaves: dict[str, list[list[int]]]


def _path(layout: StorePaths, model: ModelId) -> Path:
    return layout.shard(model)


def write(layout: StorePaths, shard: Shard) -> None:
    """Write a shard's record, durably. Blocking."""
    path = _path(layout, shard.manifest.model)
    make_directory(path.parent)
    ranges = {blob: leaf_set.to_ranges(leaves) for blob, leaves in shard.leaves.items()}
    replace_file(path, encode(ShardFile(manifest=shard.manifest, layers=shard.layers, leaves=ranges)))


def delete(layout: StorePaths, model: ModelId) -> None:
    """Delete a shard's record, durably. Absent already is fine. Blocking."""
    path = _path(layout, model)
    if path.exists():
        path.unlink()
        fsync_path(path.parent)


def read(store: Store, ledger: Ledger) -> None:
    """Add the shards on the disk to the ledger, at start. Deletes those that are not complete. Blocking."""
    paths = store.layout
    for model, path in iter_model_files(paths.shards):
        try:
            shard = _read(path, model)
            if model in ledger.stored_manifests:
                raise NotFound("the whole model is here")
            _require_leaves(shard, ledger, store)
        except (ShoalError, OSError) as e:
            log.warning("shard incomplete; dropped", model=model, reason=str(e))
            delete(paths, model)
            continue
        ledger.add_shard(shard)


def _read(path: Path, model: ModelId) -> Shard:
    record = decode(path.read_bytes(), ShardFile)
    check_manifest(record.manifest)
    sizes = record.manifest.blob_sizes
    if record.manifest.model != model or not record.leaves.keys() <= sizes.keys():
        raise BadInput("the record is of another model, or names blobs that are not the model's")
    leaves = {b: leaf_set.from_ranges(ranges, sizes[b]) for b, ranges in record.leaves.items()}
    return Shard(record.manifest, union(check_layers(run) for run in record.layers), leaves)


def _require_leaves(shard: Shard, ledger: Ledger, store: Store) -> dict[str, PartialBlobInfo]:
    """Return the partial blobs that a shard needs leaves of. Raises NotFound unless all it needs is durable."""
    partials: dict[str, PartialBlobInfo] = {}
    for f in shard.manifest.files:
        needed_leaves = shard.leaves.get(f.blob)
        if ledger.blob_size(f.blob) == f.size_bytes or needed_leaves == 0:
            continue
        partial = ledger.arrivals.partials.get(f.blob)
        if needed_leaves is None or partial is None or partial.size_bytes != f.size_bytes:
            raise NotFound(f"{f.path} of {shard.manifest.model} is not here; reserve it")
        if needed_leaves & ~durable_leaves(store, f.blob, f.size_bytes):
            raise NotFound(f"{f.path} of {shard.manifest.model}: leaves are missing; fetch them")
        partials[f.blob] = partial
    return partials


def truncate_to_size(layout: StorePaths, blob: str, size_bytes: int) -> None:
    """Extend a partial blob's data to the blob's length with a hole: loaders check the length. Blocking."""
    with (layout.partial(blob) / "data").open("r+b") as f:
        if os.fstat(f.fileno()).st_size < size_bytes:
            f.truncate(size_bytes)
            os.fsync(f.fileno())


def verify_leaves(layout: StorePaths, blob: str, size_bytes: int, leaves: int, leaf_list_digest: str) -> None:
    """Hash these leaves of a partial blob against its list, and the list against its sealed digest. Blocking.

    Raises NotFound if the list is missing, Corrupt if leaves do not match it.
    """
    try:
        hashes = layout.partial_leaves(blob).read_bytes()
    except FileNotFoundError:
        hashes = b""
    if (
        not leaf_list_digest
        or len(hashes) != leaf_list_size(size_bytes)
        or hash_leaf_list(hashes) != leaf_list_digest
    ):
        raise NotFound(f"the leaf list of blob {blob[:16]}… is missing or does not match; fetch it again")
    bad_count = 0
    sizes = Bitmap(size_bytes)
    with (layout.partial(blob) / "data").open("rb") as f:
        for first, last in leaf_set.to_ranges(leaves):
            f.seek(first * LEAF_BYTES)
            for leaf in range(first, last):
                leaf_digest = leaf_hash(f.read(sizes.leaf_bytes(leaf)))
                bad_count += leaf_digest != hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES]
    if bad_count:
        raise Corrupt(f"{bad_count} of the leaves received for blob {blob[:16]}… do not match its leaf list")


class ShardService:
    """Keeps a ledger's `shards`, their records and their published state in step."""

    def __init__(self, context: StorageContext) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._metadata = context.metadata

    async def seal(self, request: SealShard) -> ShardState:
        """Check what was fetched for some layers, record it as a shard and publish it."""
        manifest = request.manifest
        check_manifest(manifest)
        if not manifest.sealed:
            raise BadInput(f"the manifest of {manifest.model} is not sealed: some files have no sha256")
        layers = union(check_layers(run) for run in request.layers)
        async with self._context.section as held:
            held.require()
            before = self._ledger.shards.get(manifest.model)
            names = sorted({*manifest.revisions, *(before.manifest.revisions if before else [])})
            manifest = msgspec.structs.replace(manifest, revisions=names)
            leaves = requested_leaves(manifest, request.leaf_ranges, self._ledger)
            shard = Shard(manifest, union([*layers, *(before.layers if before else [])]), leaves)
            partials = await asyncio.to_thread(_require_leaves, shard, self._ledger, self._store)
        # Hashing takes a while, so it runs outside the section. Durable leaves are not written again.
        for blob, partial in partials.items():
            unverified = leaves[blob] & ~self._ledger.shard_leaves(blob)
            digest, seal = request.leaf_list_digests.get(blob, ""), request.seals.get(blob)
            sealed = SealedList(blob, partial.size_bytes, digest)
            if reason := await asyncio.to_thread(self._context.seals.refusal, seal, sealed):
                raise Refused(f"layers of {manifest.model} cannot be verified without the whole model: {reason}")
            try:
                await asyncio.to_thread(
                    verify_leaves, self._store.layout, blob, partial.size_bytes, unverified, digest
                )
            except FileNotFoundError:
                raise NotFound(f"the partial blob {blob[:16]}… is gone; reserve it again") from None
            except Corrupt:
                async with self._context.section as held:
                    if self._ledger.arrivals.is_same_arrival(blob, partial):
                        await self.discard_corrupt_partial(held, blob)
                await self._context.publishing.publish_soon()
                raise
        async with self._context.section as held:
            still_partial = await asyncio.to_thread(_require_leaves, shard, self._ledger, self._store)
            if not still_partial.keys() <= partials.keys() or not all(
                self._ledger.arrivals.is_same_arrival(blob, partials[blob]) for blob in still_partial
            ):
                raise NotFound(f"a reservation of {manifest.model} was cancelled; reserve it again")
            if self._ledger.shards.get(manifest.model) is not before:
                raise NotFound(f"the shard of {manifest.model} changed meanwhile; reserve it again")
            for blob, partial in still_partial.items():
                await asyncio.to_thread(truncate_to_size, self._store.layout, blob, partial.size_bytes)
            await asyncio.to_thread(write, self._store.layout, shard)
            self._ledger.add_shard(shard)
            self._ledger.arrivals.reserve(manifest.model, manifest.blob_sizes)
            await asyncio.to_thread(self._metadata.write_reservation, manifest.model)
            if not any(
                manifest.model in p.models - p.leaves_by_model.keys() for p in self._ledger.arrivals.partials.values()
            ):
                await self.finish_shard(held, manifest.model)  # otherwise another download fetches all of it
            await asyncio.to_thread(self._metadata.record_arrival, manifest.model)
        await self._context.publishing.publish(manifest.model)
        log.info("shard ready", model=manifest.model, layers=str(shard.layers), size_bytes=shard.size_bytes)
        return shard_state(self._context.node, shard)

    async def finish_shard(self, held: Held, model: ModelId) -> None:
        """Reduce a model's reservation to the shard that is here: no more of the model will arrive."""
        held.require()
        shard = self._ledger.shards[model]
        for blob, partial in list(self._ledger.arrivals.partials.items()):
            needed_leaves = shard.leaves.get(blob, 0)
            if model in partial.models and partial.leaves_by_model.get(model) != needed_leaves:
                changed = partial.with_model(model, needed_leaves)
                await asyncio.to_thread(
                    write_partial, self._store, blob, partial.size_bytes, changed.models, changed.leaves_by_model
                )
                self._ledger.arrivals.reserve_blob(blob, partial.size_bytes, model, needed_leaves)
            if self._ledger.arrivals.partials[blob].leaves_by_model:
                await asyncio.to_thread(refresh_partial, self._store, blob, self._ledger)

    async def require_complete(self, held: Held, shard: Shard) -> None:
        """Check that a shard is complete. If leaves were deleted, drop it and raise NotFound."""
        try:
            await asyncio.to_thread(_require_leaves, shard, self._ledger, self._store)
        except NotFound as e:
            log.warning("shard incomplete; dropped", model=shard.manifest.model, reason=e.message)
            await self.drop(held, shard.manifest.model)
            raise

    async def drop_incomplete(self, held: Held) -> None:
        """Drop every incomplete shard."""
        for shard in list(self._ledger.shards.values()):
            with suppress(NotFound):
                await self.require_complete(held, shard)

    async def drop(self, held: Held, model: ModelId) -> None:
        """Drop a shard: its model is complete, or is deleted. Does nothing if there is none."""
        held.require()
        if model in self._ledger.shards:
            await asyncio.to_thread(delete, self._store.layout, model)
            self._ledger.drop_shard(model)
            self._context.publishing.notify(model)

    async def discard_corrupt_partial(self, held: Held, blob: str) -> None:
        """Delete a corrupt partial blob, and reserve it again for the same models."""
        for model in [m for m, shard in self._ledger.shards.items() if shard.leaves.get(blob)]:
            log.warning("shard lost leaves to a corrupt partial blob; dropped", model=model, blob=blob)
            await self.drop(held, model)
        partial = self._ledger.arrivals.partials[blob]
        await asyncio.to_thread(delete_partial, self._store, blob)
        await asyncio.to_thread(
            write_partial, self._store, blob, partial.size_bytes, partial.models, partial.leaves_by_model
        )
        await asyncio.to_thread(refresh_partial, self._store, blob, self._ledger)
