"""The ledger: what the disk holds, as known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

from shoal_common.messages.manifest import Manifest
from shoal_common.store import leaf_set
from shoal_storage.ledger.entries import Part, Partial, Stamp, Unknown
from shoal_storage.ledger.lease import Lease
from shoal_storage.ledger.library_model import Adopted, File


class Ledger(msgspec.Struct):
    """What the disk is known to hold. The disk is authoritative; this is rebuilt from it at start and follows it."""

    blobs: dict[str, int] = msgspec.field(default_factory=dict)
    """Size in bytes of each blob, by sha256."""
    where: dict[str, str] = msgspec.field(default_factory=dict)
    """The id of the volume that a blob is in, arrives in, or is quarantined in. Blobs not listed are in the store."""
    doubles: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    """Extra copies of blobs: bytes by the volume ("" for the store) of each redundant file."""
    unproven: dict[str, Stamp] = msgspec.field(default_factory=dict)
    """Files with a blob's name that somebody put there. They count as used and become blobs once hashed."""
    wrong: dict[str, Stamp] = msgspec.field(default_factory=dict)
    """Those of them that did not hash to their name, with their stat at that time."""
    unknown: Unknown = msgspec.field(default_factory=Unknown)
    away: bool = False
    """Whether the store is missing from its path. An unmounted disk has lost nothing and offers nothing."""
    partials: dict[str, Partial] = msgspec.field(default_factory=dict)
    manifests: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of complete models, by `org/name@commit`."""
    broken: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests of incomplete models: never published; their remaining blobs wait for a repair or an `rm`."""
    leaving: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """Manifests, in `tombs/`, of models whose deletion failed half-way: not here, and not all gone."""
    promised: dict[str, set[str]] = msgspec.field(default_factory=dict)
    """Blobs, present or arriving, that a running fetch counts on, by `org/name@commit`."""
    quarantined: set[str] = msgspec.field(default_factory=set)
    """Corrupt blobs in quarantine that are still wanted."""
    repairable: dict[str, int] = msgspec.field(default_factory=dict)
    """Of those, the blobs that can be repaired by leaf: bytes on disk that are reused, by sha256."""
    parts: dict[str, Part] = msgspec.field(default_factory=dict)
    """Verified shards, by `org/name@commit`. Their reservations stay."""
    git: dict[str, str] = msgspec.field(default_factory=dict)
    """The sha256 of each committed blob that was named by git's sha1: `git-<sha1>` to sha256."""
    leases: dict[str, Lease] = msgspec.field(default_factory=dict)
    """Live leases, by id."""
    pinned: set[str] = msgspec.field(default_factory=set)
    """Models (`org/name@commit`) that people pinned."""
    last_uses: dict[str, float] = msgspec.field(default_factory=dict)
    """Time of each model's last use, in Unix seconds; for one never used, when it arrived."""
    wanted_s: dict[str, float] = msgspec.field(default_factory=dict)
    """When each arriving model was last known to be wanted, in Unix seconds."""
    ended: set[str] = msgspec.field(default_factory=set)
    """Arriving models whose reservation has ended: nobody wants them, and their bytes are still here."""
    paused: set[str] = msgspec.field(default_factory=set)
    """Arriving models that people paused: wanted, and not fetched."""
    adopted: dict[str, Adopted] = msgspec.field(default_factory=dict)
    """Models of libraries, by `org/name@commit`. Present, but not part of the store: they use no quota and are never
    garbage or victims. Changed by `set_library_models` alone."""
    adopted_blobs: dict[str, File] = msgspec.field(default_factory=dict)
    """Their blobs, by sha256, each with one file that has its bytes."""
    adopted_git: dict[str, str] = msgspec.field(default_factory=dict)
    """Like `sha256_by_git_name`, for blobs of libraries."""

    @property
    def on_disk(self) -> dict[str, Manifest]:
        """Every manifest in the store, of complete and incomplete models."""
        return {**self.manifests, **self.broken}

    @property
    def here(self) -> dict[str, Manifest]:
        """The models that can be pinned, used and removed: those in the store, and those with a shard here."""
        return {**{m: part.manifest for m, part in self.parts.items()}, **self.on_disk}

    def at_rest(self, model: str) -> bool:
        """Whether a model has a shard here and nothing more of it is reserved."""
        part = self.parts.get(model)
        return part is not None and all(
            p.leaves.get(model) == part.leaves.get(b, -1) for b, p in self.partials.items() if model in p.models
        )

    @property
    def offered(self) -> dict[str, Adopted]:
        """The library models, except those that the store has too."""
        return {m: a for m, a in self.adopted.items() if m not in self.manifests and m not in self.broken}

    @property
    def whole(self) -> dict[str, Manifest]:
        """The manifests of all complete models that this node offers."""
        return {**{m: a.manifest for m, a in self.offered.items()}, **self.manifests}

    def bytes_of(self, blob: str) -> int | None:
        """Return the size of a blob that is in the store or a library; None when it is in neither."""
        size_bytes = self.blobs.get(blob)
        if size_bytes is None and blob in self.adopted_blobs:
            size_bytes = self.adopted_blobs[blob].seen.size_bytes
        return size_bytes

    def drop(self, blob: str) -> int:
        """Drop a deleted blob and all its copies. Returns its bytes."""
        self.where.pop(blob, None)
        return self.blobs.pop(blob, 0) + sum(self.doubles.pop(blob, {}).values())

    def forget_places(self) -> None:
        """Drop the volumes of blobs that are no longer known."""
        known = {*self.blobs, *self.partials, *self.unproven, *self.quarantined}
        for blob in [b for b, volume_id in self.where.items() if not volume_id or b not in known]:
            del self.where[blob]

    def adopt(self, models: Mapping[str, Adopted]) -> None:
        """Set the library models, replacing all earlier ones."""
        self.adopted, self.adopted_blobs, self.adopted_git = dict(models), {}, {}
        for model in sorted(models):
            library_model = models[model]
            for f in library_model.manifest.files:
                self.adopted_blobs.setdefault(f.sha256, library_model.files[f.path])
            self.adopted_git.update(library_model.git)

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs and their extra copies, of the leaves that shards need, and of unverified files."""
        doubled = sum(sum(copies.values()) for copies in self.doubles.values())
        unproven_bytes = sum(stamp.size_bytes for stamp in self.unproven.values())
        return sum(self.blobs.values()) + self.part_bytes + unproven_bytes + doubled

    @property
    def part_bytes(self) -> int:
        """Bytes of the partial blobs' leaves that shards need: present and verified. Shared leaves count once."""
        return sum(self.part_bytes_of(b, p) for b, p in self.partials.items()) if self.parts else 0

    def part_bytes_of(self, blob: str, partial: Partial) -> int:
        """The same, for one partial blob."""
        return leaf_set.size_of(self.part_leaves(blob), partial.size_bytes)

    def part_leaves(self, blob: str) -> int:
        """The leaves of a blob that shards need; verified, unless the blob is here whole."""
        leaves = 0
        for part in list(self.parts.values()):  # the published state of a volume is computed in a thread
            leaves |= part.leaves.get(blob, 0)
        return leaves

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for arriving blobs, and those left by ended reservations, minus those counted as used."""
        return sum(self.promised_bytes(p) for p in self.partials.values()) - self.part_bytes

    @property
    def in_flight_bytes(self) -> int:
        """Bytes reserved and not yet allocated: they will still reduce the file system's free space."""
        return sum(self.in_flight_by_root.values())

    @property
    def in_flight_by_root(self) -> Counter[str]:
        """The same, by volume; "" for the store."""
        in_flight = Counter[str]()
        for blob, p in self.partials.items():
            in_flight[self.where.get(blob, "")] += max(self.promised_bytes(p) - p.allocated_bytes, 0)
        return in_flight

    @property
    def on_its_way(self) -> set[str]:
        """Models with a reservation, ended or not."""
        return {*self.promised, *(m for p in self.partials.values() for m in p.models)}

    def promises(self, partial: Partial) -> bool:
        """Whether a partial blob may still grow: the reservation of one of its models has not ended."""
        return not partial.models or not partial.models <= self.ended

    def promised_bytes(self, partial: Partial, standing: str = "") -> int:
        """Bytes a partial blob may come to occupy by its active reservations; `active_model`'s counts as active."""
        active = partial.models - (self.ended - {standing})
        if partial.models and not active:
            return partial.allocated_bytes
        counted = partial if active == partial.models else msgspec.structs.replace(partial, models=active)
        return counted.promised_bytes

    def needed_bytes(self, blob: str, size_bytes: int, model: str = "", leaves: int | None = None) -> int:
        """Bytes that reserving an absent blob, or leaves of it, for a model adds to what is already reserved."""
        partial = self.partials.get(blob)
        if partial is None:
            return size_bytes if leaves is None else leaf_set.size_of(leaves, size_bytes)
        after = self.promised_bytes(partial.wanted_by(model, leaves), standing=model)
        return max(0, after - self.promised_bytes(partial))
