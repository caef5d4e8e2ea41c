"""The ledger: what the disk holds, as known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Final

from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_common.store import leaf_set
from shoal_storage.ledger.arrivals import Arrivals
from shoal_storage.ledger.blob_volumes import BlobVolumes
from shoal_storage.ledger.entries import BlobFileStat, ForeignFiles, PartialBlobInfo, Shard, replace_entries
from shoal_storage.ledger.library_model import LibraryModel, LibraryModels
from shoal_storage.ledger.uses import ModelUses


class Ledger:
    """What the disk is known to hold. The disk is authoritative; this is rebuilt from it at start and follows it.

    Everybody may read its collections; only its methods change them. After each method:

    - a blob is present (`blobs`) or waits to be hashed (`unverified`), never both; `corrupt` is part of `unverified`;
    - every file of a complete model (`manifests`) is a blob of the right size, in the store or in a library; after a
      change of `libraries` this holds again once `recompute_completeness` was called;
    - a model is in at most one of `manifests`, `incomplete` and `deleting`;
    - `repairable` is part of `quarantined`;
    - `volume_by_blob` names only blobs that are present, unverified, arriving or quarantined, and those that the disk
      is about to receive;
    - `sha256_by_git_name` names only blobs that are present;
    - `used_bytes` and `reserved_bytes` together count every byte once that is here or may come; no part of them that
      is in flight is negative.

    A blob may be both present and arriving: one of another size is fetched again, and a file that somebody copied in
    may turn out to be what arrives.
    """

    blobs: Final[Mapping[str, int]]
    """Size in bytes of each blob, by sha256."""
    volume_by_blob: Final[Mapping[str, str]]
    """The id of the volume that a blob is in, arrives in, or is quarantined in. Blobs not listed are in the store."""
    redundant_copies: Final[Mapping[str, Mapping[str, int]]]
    """Extra copies of blobs: bytes by the volume ("" for the store) of each redundant file."""
    unverified: Final[Mapping[str, BlobFileStat]]
    """Files with a blob's name that somebody put there. They count as used and become blobs once hashed."""
    corrupt: Final[Mapping[str, BlobFileStat]]
    """Those of them that did not hash to their name, with their stat at that time."""
    manifests: Final[Mapping[ModelId, Manifest]]
    """Manifests of complete models, by `org/name@commit`."""
    incomplete: Final[Mapping[ModelId, Manifest]]
    """Manifests of incomplete models: never published; their remaining blobs wait for a repair or an `rm`."""
    deleting: Final[Mapping[ModelId, Manifest]]
    """Manifests, in `tombs/`, of models whose deletion failed half-way: not here, and not all gone."""
    quarantined: Final[Set[str]]
    """Corrupt blobs in quarantine that are still wanted."""
    repairable: Final[Mapping[str, int]]
    """Of those, the blobs that can be repaired by leaf: bytes on disk that are reused, by sha256."""
    shards: Final[Mapping[ModelId, Shard]]
    """Verified shards, by `org/name@commit`. Their reservations stay."""
    sha256_by_git_name: Final[Mapping[str, str]]
    """The sha256 of each committed blob that was named by git's sha1: `git-<sha1>` to sha256."""
    arrivals: Final[Arrivals]
    """Reservations, and partial blobs."""
    libraries: Final[LibraryModels]
    """The models of libraries, which are present too."""
    uses: Final[ModelUses]
    """Pins, leases and last uses."""

    def __init__(self, volumes: BlobVolumes | None = None) -> None:
        self._volumes = volumes or BlobVolumes()
        self.volume_by_blob = self._volumes.by_blob
        self.blobs = self._blobs = dict[str, int]()
        self.redundant_copies = self._redundant_copies = dict[str, dict[str, int]]()
        self.unverified = self._unverified = dict[str, BlobFileStat]()
        self.corrupt = self._corrupt = dict[str, BlobFileStat]()
        self.manifests = self._manifests = dict[ModelId, Manifest]()
        self.incomplete = self._incomplete = dict[ModelId, Manifest]()
        self.deleting = self._deleting = dict[ModelId, Manifest]()
        self.quarantined = self._quarantined = set[str]()
        self.repairable = self._repairable = dict[str, int]()
        self.shards = self._shards = dict[ModelId, Shard]()
        self.sha256_by_git_name = self._sha256_by_git_name = dict[str, str]()
        self.arrivals = Arrivals(self._volumes, self._forget_volume_of)
        self.libraries, self.uses = LibraryModels(), ModelUses()
        self._git_name_by_sha256 = dict[str, str]()
        self._foreign, self._store_missing = ForeignFiles(), False

    # Reads

    @property
    def foreign(self) -> ForeignFiles:
        """The foreign files, as of the last scan."""
        return self._foreign

    @property
    def store_missing(self) -> bool:
        """Whether the store is missing from its path. An unmounted disk has lost nothing and offers nothing."""
        return self._store_missing

    @property
    def stored_manifests(self) -> dict[ModelId, Manifest]:
        """Every manifest in the store, of complete and incomplete models."""
        return {**self._manifests, **self._incomplete}

    @property
    def local_manifests(self) -> dict[ModelId, Manifest]:
        """The models that can be pinned, used and removed: those in the store, and those with a shard here."""
        return {**{m: part.manifest for m, part in self._shards.items()}, **self.stored_manifests}

    @property
    def offered_library_models(self) -> dict[ModelId, LibraryModel]:
        """The library models, except those that the store has too."""
        return {
            m: a for m, a in self.libraries.models.items() if m not in self._manifests and m not in self._incomplete
        }

    @property
    def complete_manifests(self) -> dict[ModelId, Manifest]:
        """The manifests of all complete models that this node offers."""
        return {**{m: a.manifest for m, a in self.offered_library_models.items()}, **self._manifests}

    def blob_size(self, blob: str) -> int | None:
        """Return the size of a blob that is in the store or a library; None when it is in neither."""
        size_bytes = self._blobs.get(blob)
        if size_bytes is None and blob in self.libraries.blobs:
            size_bytes = self.libraries.blobs[blob].stat.size_bytes
        return size_bytes

    def sha256_of(self, git_name: str) -> str | None:
        """Return the sha256 of a blob, in the store or a library, that is known by git's sha1: `git-<sha1>`."""
        return self._sha256_by_git_name.get(git_name) or self.libraries.sha256_by_git_name.get(git_name)

    def is_complete(self, manifest: Manifest) -> bool:
        """Whether every file of a manifest is a blob of the right size, in the store or in a library."""
        return all(self.blob_size(f.sha256) == f.size_bytes for f in manifest.files)

    def is_shard_settled(self, model: ModelId) -> bool:
        """Whether a model has a shard here and nothing more of it is reserved."""
        part = self._shards.get(model)
        return part is not None and all(
            p.leaves_by_model.get(model) == part.leaves.get(b, -1)
            for b, p in self.arrivals.partials.items()
            if model in p.models
        )

    @property
    def used_bytes(self) -> int:
        """Bytes of all blobs and their extra copies, of the leaves that shards need, and of unverified files."""
        doubled = sum(sum(copies.values()) for copies in self._redundant_copies.values())
        unverified_bytes = sum(stamp.size_bytes for stamp in self._unverified.values())
        return sum(self._blobs.values()) + self.shard_bytes + unverified_bytes + doubled

    @property
    def shard_bytes(self) -> int:
        """Bytes of the partial blobs' leaves that shards need: present and verified. Shared leaves count once."""
        return sum(self.shard_bytes_of(b, p) for b, p in self.arrivals.partials.items()) if self._shards else 0

    def shard_bytes_of(self, blob: str, partial: PartialBlobInfo) -> int:
        """The same, for one partial blob."""
        return leaf_set.byte_count(self.shard_leaves(blob), partial.size_bytes)

    def shard_leaves(self, blob: str) -> int:
        """The leaves of a blob that shards need; verified, unless the blob is here whole."""
        leaves = 0
        for part in list(self._shards.values()):  # the published state of a volume is computed in a thread
            leaves |= part.leaves.get(blob, 0)
        return leaves

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for arriving blobs, and those left by ended reservations, minus those counted as used."""
        return sum(self.arrivals.reserved_bytes_of(p) for p in self.arrivals.partials.values()) - self.shard_bytes

    # Blobs

    def add_blob(self, blob: str, size_bytes: int) -> None:
        """Add a blob whose file was verified: by an earlier process, or just now."""
        self._unverified.pop(blob, None)
        self._corrupt.pop(blob, None)
        self._blobs[blob] = size_bytes

    def commit_blob(self, blob: str, sha256: str, size_bytes: int) -> None:
        """Turn a partial blob, perhaps named by git's sha1, into a blob. It replaces the one in quarantine."""
        self.add_blob(sha256, size_bytes)
        self.arrivals.drop_partial(blob)
        self.drop_quarantined(sha256)
        if blob != sha256:
            self._sha256_by_git_name[blob], self._git_name_by_sha256[sha256] = sha256, blob

    def drop_blob(self, blob: str) -> int:
        """Drop a deleted blob that no model needs, and all its copies. Returns its bytes."""
        copies = self._redundant_copies.pop(blob, {})
        return self._discard_blob(blob) + sum(copies.values())

    def mark_missing(self, blobs: Iterable[str], also_in_libraries: bool = False) -> list[ModelId]:
        """Drop blobs whose file is gone, replaced or corrupt. Returns the models that are incomplete now."""
        for blob in set(blobs):
            self._discard_blob(blob)
            if also_in_libraries:
                self.libraries.mark_missing(blob)
        return self._mark_incomplete_models()

    def _discard_blob(self, blob: str) -> int:
        self._sha256_by_git_name.pop(self._git_name_by_sha256.pop(blob, ""), None)
        size_bytes = self._blobs.pop(blob, 0)
        self._forget_volume_of(blob)
        return size_bytes

    def _forget_volume_of(self, blob: str) -> None:
        known = (self._blobs, self.arrivals.partials, self._unverified, self._quarantined)
        if not any(blob in blobs for blobs in known):
            self._volumes.place(blob, "")

    def move_blob(self, blob: str, volume_id: str) -> None:
        """Record that a blob is on another volume; "" for the store."""
        self._volumes.place(blob, volume_id)

    def add_copy(self, blob: str, volume_id: str, size_bytes: int) -> None:
        """Add a redundant copy of a blob."""
        self._redundant_copies.setdefault(blob, {})[volume_id] = size_bytes

    def set_copies(self, copies: Mapping[str, Mapping[str, int]]) -> None:
        """Set all redundant copies, as a scan found them."""
        replace_entries(self._redundant_copies, {blob: dict(by_volume) for blob, by_volume in copies.items()})

    def drop_copies(self, blob: str) -> None:
        """Drop a blob's redundant copies, which were deleted."""
        self._redundant_copies.pop(blob, None)

    def add_unverified(self, blob: str, stat: BlobFileStat) -> None:
        """Add a file with a blob's name, on the volume that its stat names. A blob that it replaces is missing."""
        if blob in self._blobs:
            self.mark_missing([blob])
        if blob in self._corrupt and not stat.same_file(self._corrupt[blob]):
            del self._corrupt[blob]
        self._unverified[blob] = stat
        self._volumes.place(blob, stat.volume_id)

    def mark_corrupt(self, blob: str, stat: BlobFileStat) -> None:
        """Record that an unverified file, with this stat now, did not hash to its name."""
        self._unverified[blob] = self._corrupt[blob] = stat

    def drop_unverified(self, blob: str) -> None:
        """Drop an unverified file that is gone."""
        self._corrupt.pop(blob, None)
        self._unverified.pop(blob, None)
        self._forget_volume_of(blob)

    def quarantine(self, blob: str) -> list[ModelId]:
        """Move a corrupt blob to quarantine. Returns the models that are incomplete now."""
        self._quarantined.add(blob)
        self._repairable.pop(blob, None)
        return self.mark_missing([blob])

    def add_quarantined(self, blobs: Iterable[str]) -> None:
        """Add blobs that were found in quarantine."""
        self._quarantined.update(blobs)

    def set_repairable(self, repairable: Mapping[str, int]) -> None:
        """Set which blobs in quarantine can be repaired by leaf, with the bytes that each repair reuses."""
        replace_entries(self._repairable, {b: n for b, n in repairable.items() if b in self._quarantined})

    def drop_quarantined(self, blob: str) -> None:
        """Drop a blob that left quarantine: deleted, or reserved again with its good leaves."""
        self._quarantined.discard(blob)
        self._repairable.pop(blob, None)
        self._forget_volume_of(blob)

    def detach_volume(self, volume_id: str) -> list[ModelId]:
        """Drop what a missing volume holds, or let a copy elsewhere take its place. Returns models incomplete now."""

        def here(blobs: Iterable[str]) -> list[str]:
            return [blob for blob in blobs if self.volume_by_blob.get(blob, "") == volume_id]

        for blob, copies in list(self._redundant_copies.items()):
            copies.pop(volume_id, None)
            if copies and here([blob]):
                self._volumes.place(blob, next(iter(copies)))
                del copies[next(iter(copies))]
            if not copies:
                del self._redundant_copies[blob]
        for blob in here(self._unverified):
            self.drop_unverified(blob)
        for blob in here(self.arrivals.partials):
            self.arrivals.drop_partial(blob)
        for blob in here(self._quarantined):
            self.drop_quarantined(blob)
        lost = self.mark_missing(here(self._blobs))
        self._volumes.forget_volume(volume_id)
        return lost

    def prune_volumes(self) -> None:
        """Forget the volumes of blobs that never came."""
        self._volumes.forget_all_but({*self._blobs, *self.arrivals.partials, *self._unverified, *self._quarantined})

    def set_foreign(self, foreign: ForeignFiles) -> None:
        """Set the foreign files that a scan counted."""
        self._foreign = foreign

    def set_store_missing(self, missing: bool) -> None:
        """Record whether the store is missing from its path. Its contents stay in the ledger."""
        self._store_missing = missing

    # Models

    def add_manifest(self, manifest: Manifest) -> None:
        """Add a manifest found on the disk. Its model is incomplete until `mark_complete`."""
        self.drop_manifest(manifest.model)
        self._deleting.pop(manifest.model, None)  # it is here again: a start deletes the tombstone
        self._incomplete[manifest.model] = manifest

    def drop_manifest(self, model: ModelId) -> None:
        """Drop a model whose manifest is gone. Its blobs stay."""
        self._manifests.pop(model, None)
        self._incomplete.pop(model, None)

    def seal(self, manifest: Manifest) -> None:
        """Make a model complete. All its blobs must be present."""
        assert self.is_complete(manifest), f"blobs of {manifest.model} are missing"
        self.add_manifest(manifest)
        self._manifests[manifest.model] = self._incomplete.pop(manifest.model)

    def mark_incomplete(self, model: ModelId) -> None:
        """Make a complete model incomplete: it cannot be offered. `mark_complete` tries it again."""
        self._incomplete[model] = self._manifests.pop(model)

    def mark_complete(self) -> list[ModelId]:
        """Make incomplete models complete once all their blobs are present; return them, `org/name@commit`.

        Models being downloaded are left out: the download seals them as its own last step.
        """
        completed = sorted(
            model
            for model, manifest in self._incomplete.items()
            if model not in self.arrivals.reservations and self.is_complete(manifest)
        )
        for model in completed:
            self._manifests[model] = self._incomplete.pop(model)
        return completed

    def _mark_incomplete_models(self) -> list[ModelId]:
        lost = sorted(model for model, manifest in self._manifests.items() if not self.is_complete(manifest))
        for model in lost:
            self.mark_incomplete(model)
        return lost

    def recompute_completeness(self) -> tuple[list[ModelId], list[ModelId]]:
        """After library blobs came or went: return the models that are incomplete now, and those complete now."""
        return self._mark_incomplete_models(), self.mark_complete()

    def begin_deletion(self, model: ModelId) -> Manifest | None:
        """Move a model out of the store's models. Returns its manifest, also if its deletion began earlier."""
        manifest = self.stored_manifests.get(model)
        if manifest is not None:
            self.drop_manifest(model)
            self._deleting[model] = manifest
        return self._deleting.get(model)

    def add_deletion(self, manifest: Manifest) -> None:
        """Add a deletion that an earlier process began, unless the model is here again."""
        if manifest.model not in self.stored_manifests:
            self._deleting[manifest.model] = manifest

    def end_deletion(self, model: ModelId) -> None:
        """Drop a model whose deletion is complete."""
        self._deleting.pop(model, None)

    def add_shard(self, shard: Shard) -> None:
        """Add a verified shard, or replace the model's."""
        self._shards[shard.manifest.model] = shard

    def drop_shard(self, model: ModelId) -> None:
        """Drop a shard: the model is complete, or is deleted."""
        self._shards.pop(model, None)
