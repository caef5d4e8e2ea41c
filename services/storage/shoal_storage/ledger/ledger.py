"""The ledger: what the disk holds, as known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

from shoal_common.messages.manifest import Manifest
from shoal_common.store import leaf_set
from shoal_storage.ledger.entries import BlobFileStat, ForeignFiles, PartialBlobInfo, Shard
from shoal_storage.ledger.lease import ModelLease
from shoal_storage.ledger.library_model import LibraryFile, LibraryModel


class Ledger(msgspec.Struct):
    """What the disk is known to hold. The disk is authoritative; this is rebuilt from it at start and follows it."""

    blobs: dict[str, int] = msgspec.field(default_factory=dict)
    """Size in bytes of each blob, by sha256."""
    volume_by_blob: dict[str, str] = msgspec.field(default_factory=dict)
    """The id of the volume that a blob is in, arrives in, or is quarantined in. Blobs not listed are in the store."""
    redundant_copies: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    """Extra copies of blobs: bytes by the volume ("" for the store) of each redundant file."""
    unverified: dict[str, BlobFileStat] = msgspec.field(default_factory=dict)
    """Files with a blob's name that somebody put there. They count as used and become blobs once hashed."""
    corrupt: dict[str, BlobFileStat] = msgspec.field(default_factory=dict)
    """Those of them that did not hash to their name, with their stat at that time."""
    foreign: ForeignFiles = msgspec.field(default_factory=ForeignFiles)
    store_missing: bool = False
    """Whether the store is missing from its path. An unmounted disk has lost nothing and offers nothing."""
    partials: dict[str, PartialBlobInfo] = msgspec.field(default_factory=dict)
    manifests: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of complete models, by `org/name@commit`."""
    incomplete: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of incomplete models: never published; their remaining blobs wait for a repair or an `rm`."""
    deleting: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests, in `tombs/`, of models whose deletion failed half-way: not here, and not all gone."""
    reservations: dict[str, set[str]] = msgspec.field(default_factory=dict)
    """Blobs, present or arriving, that a running fetch counts on, by `org/name@commit`."""
    quarantined: set[str] = msgspec.field(default_factory=set)
    """Corrupt blobs in quarantine that are still wanted."""
    repairable: dict[str, int] = msgspec.field(default_factory=dict)
    """Of those, the blobs that can be repaired by leaf: bytes on disk that are reused, by sha256."""
    shards: dict[str, Shard] = msgspec.field(default_factory=dict)
    """Verified shards, by `org/name@commit`. Their reservations stay."""
    sha256_by_git_name: dict[str, str] = msgspec.field(default_factory=dict)
    """The sha256 of each committed blob that was named by git's sha1: `git-<sha1>` to sha256."""
    leases: dict[str, ModelLease] = msgspec.field(default_factory=dict)
    """Live leases, by id."""
    pinned: set[str] = msgspec.field(default_factory=set)
    """Models (`org/name@commit`) that people pinned."""
    last_uses: dict[str, float] = msgspec.field(default_factory=dict)
    """Time of each model's last use, in Unix seconds; for one never used, when it arrived."""
    last_wanted_s: dict[str, float] = msgspec.field(default_factory=dict)
    """When each arriving model was last known to be wanted, in Unix seconds."""
    ended_reservations: set[str] = msgspec.field(default_factory=set)
    """Arriving models whose reservation has ended: nobody wants them, and their bytes are still here."""
    paused_models: set[str] = msgspec.field(default_factory=set)
    """Arriving models that people paused: wanted, and not fetched."""
    library_models: dict[str, LibraryModel] = msgspec.field(default_factory=dict)
    """Models of libraries, by `org/name@commit`. Present, but not part of the store: they use no quota and are never
    garbage or victims. Changed by `set_library_models` alone."""
    library_blobs: dict[str, LibraryFile] = msgspec.field(default_factory=dict)
    """Their blobs, by sha256, each with one file that has its bytes."""
    library_sha256_by_git_name: dict[str, str] = msgspec.field(default_factory=dict)
    """Like `sha256_by_git_name`, for blobs of libraries."""

    @property
    def stored_manifests(self) -> dict[str, Manifest]:
        """Every manifest in the store, of complete and incomplete models."""
        return {**self.manifests, **self.incomplete}

    @property
    def local_manifests(self) -> dict[str, Manifest]:
        """The models that can be pinned, used and removed: those in the store, and those with a shard here."""
        return {**{m: part.manifest for m, part in self.shards.items()}, **self.stored_manifests}

    def is_shard_settled(self, model: str) -> bool:
        """Whether a model has a shard here and nothing more of it is reserved."""
        part = self.shards.get(model)
        return part is not None and all(
            p.leaves_by_model.get(model) == part.leaves.get(b, -1)
            for b, p in self.partials.items()
            if model in p.models
        )

    @property
    def offered_library_models(self) -> dict[str, LibraryModel]:
        """The library models, except those that the store has too."""
        return {m: a for m, a in self.library_models.items() if m not in self.manifests and m not in self.incomplete}

    @property
    def complete_manifests(self) -> dict[str, Manifest]:
        """The manifests of all complete models that this node offers."""
        return {**{m: a.manifest for m, a in self.offered_library_models.items()}, **self.manifests}

    def blob_size(self, blob: str) -> int | None:
        """Return the size of a blob that is in the store or a library; None when it is in neither."""
        size_bytes = self.blobs.get(blob)
        if size_bytes is None and blob in self.library_blobs:
            size_bytes = self.library_blobs[blob].stat.size_bytes
        return size_bytes

    def drop_blob(self, blob: str) -> int:
        """Drop a deleted blob and all its copies. Returns its bytes."""
        self.volume_by_blob.pop(blob, None)
        return self.blobs.pop(blob, 0) + sum(self.redundant_copies.pop(blob, {}).values())

    def prune_locations(self) -> None:
        """Drop the volumes of blobs that are no longer known."""
        known = {*self.blobs, *self.partials, *self.unverified, *self.quarantined}
        for blob in [b for b, volume_id in self.volume_by_blob.items() if not volume_id or b not in known]:
            del self.volume_by_blob[blob]

    def set_library_models(self, models: Mapping[str, LibraryModel]) -> None:
        """Set the library models, replacing all earlier ones."""
        self.library_models, self.library_blobs, self.library_sha256_by_git_name = dict(models), {}, {}
        for model in sorted(models):
            library_model = models[model]
            for f in library_model.manifest.files:
                self.library_blobs.setdefault(f.sha256, library_model.files[f.path])
            self.library_sha256_by_git_name.update(library_model.sha256_by_git_name)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs and their extra copies, of the leaves that shards need, and of unverified files."""
        doubled = sum(sum(copies.values()) for copies in self.redundant_copies.values())
        unverified_bytes = sum(stamp.size_bytes for stamp in self.unverified.values())
        return sum(self.blobs.values()) + self.shard_bytes + unverified_bytes + doubled

    @property
    def shard_bytes(self) -> int:
        """Bytes of the partial blobs' leaves that shards need: present and verified. Shared leaves count once."""
        return sum(self.shard_bytes_of(b, p) for b, p in self.partials.items()) if self.shards else 0

    def shard_bytes_of(self, blob: str, partial: PartialBlobInfo) -> int:
        """The same, for one partial blob."""
        return leaf_set.byte_count(self.shard_leaves(blob), partial.size_bytes)

    def shard_leaves(self, blob: str) -> int:
        """The leaves of a blob that shards need; verified, unless the blob is here whole."""
        leaves = 0
        for part in list(self.shards.values()):  # the published state of a volume is computed in a thread
            leaves |= part.leaves.get(blob, 0)
        return leaves

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for arriving blobs, and those left by ended reservations, minus those counted as used."""
        return sum(self.reserved_bytes_of(p) for p in self.partials.values()) - self.shard_bytes

    @property
    def in_flight_bytes(self) -> int:
        """Bytes reserved and not yet allocated: they will still reduce the file system's free space."""
        return sum(self.in_flight_by_volume.values())

    @property
    def in_flight_by_volume(self) -> Counter[str]:
        """The same, by volume; "" for the store."""
        in_flight = Counter[str]()
        for blob, p in self.partials.items():
            in_flight[self.volume_by_blob.get(blob, "")] += max(self.reserved_bytes_of(p) - p.allocated_bytes, 0)
        return in_flight

    @property
    def arriving_models(self) -> set[str]:
        """Models with a reservation, ended or not."""
        return {*self.reservations, *(m for p in self.partials.values() for m in p.models)}

    def is_reserved(self, partial: PartialBlobInfo) -> bool:
        """Whether a partial blob may still grow: the reservation of one of its models has not ended."""
        return not partial.models or not partial.models <= self.ended_reservations

    def reserved_bytes_of(self, partial: PartialBlobInfo, active_model: str = "") -> int:
        """Bytes a partial blob may come to occupy by its active reservations; `active_model`'s counts as active."""
        active = partial.models - (self.ended_reservations - {active_model})
        if partial.models and not active:
            return partial.allocated_bytes
        counted = partial if active == partial.models else msgspec.structs.replace(partial, models=active)
        return counted.reserved_bytes

    def needed_bytes(self, blob: str, size_bytes: int, model: str = "", leaves: int | None = None) -> int:
        """Bytes that reserving an absent blob, or leaves of it, for a model adds to what is already reserved."""
        partial = self.partials.get(blob)
        if partial is None:
            return size_bytes if leaves is None else leaf_set.byte_count(leaves, size_bytes)
        after = self.reserved_bytes_of(partial.with_model(model, leaves), active_model=model)
        return max(0, after - self.reserved_bytes_of(partial))
