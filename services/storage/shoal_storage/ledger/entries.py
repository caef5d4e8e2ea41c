"""The entries of the ledger: partial blobs, shards, files."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TypeVar

import msgspec

from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_common.store import leaf_set

_BLOCK_BYTES = 64 << 10
"""The largest block size of common file systems. What a file occupies beyond its bytes is less, and not counted."""


_K = TypeVar("_K")
_V = TypeVar("_V")


class PartialBlobInfo(msgspec.Struct, frozen=True):
    """A partial blob: its size, the bytes allocated on disk so far, and the models it is for."""

    size_bytes: int
    allocated_bytes: int = 0
    models: Set[ModelId] = frozenset()
    leaves_by_model: Mapping[ModelId, int] = msgspec.field(default_factory=dict)
    """The leaves wanted by each model that does not want the whole blob. The other models want all of it."""
    durable_leaves: int = 0
    """Durable leaves, as of the last reservation. Only used when no model wants the whole blob."""
    arrival: int = 0
    """Set by the ledger: a blob that is dropped and reserved again has another, and maybe other bytes."""

    @property
    def _is_sparse(self) -> bool:
        """Whether no model wants the whole blob."""
        return bool(self.leaves_by_model) and bool(self.models) and self.models <= self.leaves_by_model.keys()

    @property
    def reserved_leaves(self) -> int:
        """The leaves that may arrive or are already durable."""
        if not self._is_sparse:
            return leaf_set.all_leaves(self.size_bytes)
        leaves = self.durable_leaves
        for model in self.models:
            leaves |= self.leaves_by_model[model]
        return leaves

    @property
    def reserved_bytes(self) -> int:
        """Bytes it may come to occupy; never less than it occupies now, in whole file system blocks."""
        # Read for every partial at every admission: build a leaf set only where one is needed.
        full_bytes = (
            leaf_set.byte_count(self.reserved_leaves, self.size_bytes) if self._is_sparse else self.size_bytes
        )
        return full_bytes if self.allocated_bytes < full_bytes + _BLOCK_BYTES else self.allocated_bytes

    def with_model(self, model: ModelId, leaves: int | None) -> PartialBlobInfo:
        """Return a copy that this model also wants: these leaves, or all of it."""
        others = {m: x for m, x in self.leaves_by_model.items() if m != model}
        by_model = others if leaves is None else {**others, model: leaves}
        return msgspec.structs.replace(self, models={*self.models, model}, leaves_by_model=by_model)

    def with_only_model(self, model: ModelId) -> PartialBlobInfo:
        """Return a copy that only this model wants."""
        return msgspec.structs.replace(self, models={model})

    def without_model(self, model: ModelId) -> PartialBlobInfo:
        """Return a copy that this model no longer wants."""
        rest = {m: x for m, x in self.leaves_by_model.items() if m != model}
        return msgspec.structs.replace(self, models=self.models - {model}, leaves_by_model=rest)


class Shard(msgspec.Struct, frozen=True):
    """A shard: the layers of a model that are here, `[first, last)` each, when the whole model is not."""

    manifest: Manifest
    layers: list[list[int]]
    leaves: dict[str, int]
    """The leaves needed of each blob that is not needed whole; empty for a blob that is not needed."""

    @property
    def size_bytes(self) -> int:
        """Bytes that its layers need."""
        return sum(
            leaf_set.byte_count(self.leaves[b], size) if b in self.leaves else size
            for b, size in self.manifest.blob_sizes.items()
        )


class BlobFileStat(msgspec.Struct, frozen=True):
    """The stat of a blob's file. A different stat means another file or changed content."""

    size_bytes: int
    mtime_ns: int
    inode: int
    is_verified: bool = False
    """Whether the file carries a verification stamp (`verification_stamp.py`)."""
    volume_id: str = ""
    """The id of the volume that holds it; "" for the store."""

    def same_file(self, other: BlobFileStat) -> bool:
        """Whether nothing was written in between."""
        own = self.size_bytes, self.mtime_ns, self.inode, self.volume_id
        return own == (other.size_bytes, other.mtime_ns, other.inode, other.volume_id)


class ForeignFiles(msgspec.Struct, frozen=True):
    """Foreign files in the store: counted, never deleted. `paths`: the first few, relative to the store."""

    count: int = 0
    size_bytes: int = 0
    paths: tuple[str, ...] = ()


def replace_entries(target: dict[_K, _V], entries: Mapping[_K, _V]) -> None:
    """Make a dict equal to another, without emptying it in between: threads may be reading it."""
    for key in target.keys() - entries.keys():
        del target[key]
    target.update(entries)
