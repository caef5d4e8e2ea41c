"""Compare a scan with the ledger, and apply the difference. Pure."""

from __future__ import annotations

import msgspec

from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_storage.ledger.entries import BlobFileStat, ForeignFiles
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.scan.scanner import StoreScan


class StoreDiff(msgspec.Struct, frozen=True):
    """Changes on the disk that the ledger lacks. Blobs by sha256, models as `org/name@commit`."""

    lost_blobs: set[str]
    """Blobs whose file is gone or was replaced."""
    replaced_blobs: set[str]
    """Those of them that were replaced: the new file is in `unverified`."""
    unverified: dict[str, BlobFileStat]
    """Files to hash: in the place of an unknown blob, or in that of a known blob whose file they are not."""
    moved_blobs: dict[str, str]
    """Intact blobs now on another volume ("" for the store itself): the copy in the ledger is gone."""
    redundant_copies: dict[str, dict[str, int]]
    """All blobs that are present more than once."""
    unverified_gone: set[str]
    """Unverified files that are gone."""
    removed_models: set[ModelId]
    """Models whose manifest is gone."""
    changed_manifests: dict[ModelId, Manifest]
    """Manifests that are new or changed."""
    unlinked_models: set[ModelId]
    """Complete models with view files that are missing or are not the blobs."""
    foreign: ForeignFiles

    @property
    def changed_blobs(self) -> set[str]:
        """The blobs that differ from the ledger in anything."""
        return {*self.lost_blobs, *self.unverified, *self.moved_blobs, *self.unverified_gone, *self.redundant_copies}

    @property
    def changed_models(self) -> set[ModelId]:
        """The models that differ from the ledger in anything."""
        return {*self.removed_models, *self.changed_manifests, *self.unlinked_models}

    def changes_ledger(self, ledger: Ledger) -> bool:
        """Return whether anything differs from the ledger."""
        changes = (
            self.lost_blobs,
            self.unverified,
            self.moved_blobs,
            self.unverified_gone,
            self.removed_models,
            self.changed_manifests,
            self.unlinked_models,
        )
        return any(changes) or self.foreign != ledger.foreign or self.redundant_copies != ledger.redundant_copies


class DiffResult(msgspec.Struct, frozen=True):
    """Models (`org/name@commit`) affected by an update of the ledger."""

    lost_models: list[ModelId]
    """Complete before, and now incomplete or gone."""
    found_models: list[ModelId]
    """Complete now, and before incomplete, absent or with another manifest."""


def is_trusted(stamp: BlobFileStat, has_leaf_hash_file: bool) -> bool:
    """Return whether startup accepts a file as the blob it is named for, without hashing it.

    `has_leaf_hash_file`: its leaf hash file names its mtime. That holds in a store that was copied whole, with
    its mtimes, to another disk, where no file carries its verification stamp.
    """
    return stamp.is_verified or has_leaf_hash_file


def diff_store(ledger: Ledger, scan: StoreScan) -> StoreDiff:
    """Return how a scan of the disk differs from the ledger."""
    intact = {b for b, size in ledger.blobs.items() if b in scan.blobs and _is_intact(size, scan.blobs[b])}
    lost = ledger.blobs.keys() - intact
    unverified = {
        b: stamp
        for b, stamp in scan.blobs.items()
        if b not in intact and not (b in ledger.unverified and stamp.same_file(ledger.unverified[b]))
    }
    on_disk = ledger.stored_manifests
    return StoreDiff(
        lost_blobs=lost,
        replaced_blobs=lost & scan.blobs.keys(),
        unverified=unverified,
        moved_blobs={
            b: scan.blobs[b].volume_id for b in intact if scan.blobs[b].volume_id != ledger.volume_by_blob.get(b, "")
        },
        redundant_copies={b: copies for b, copies in scan.redundant_copies.items() if b in intact},
        unverified_gone=ledger.unverified.keys() - scan.blobs.keys(),
        removed_models=on_disk.keys() - scan.manifests.keys() - scan.unreadable_models,
        changed_manifests={m: manifest for m, manifest in scan.manifests.items() if on_disk.get(m) != manifest},
        unlinked_models=scan.unlinked_models & ledger.manifests.keys(),
        foreign=scan.foreign,
    )


def _is_intact(size_bytes: int, stamp: BlobFileStat) -> bool:
    # A file without its verification stamp was replaced or written to.
    return stamp.size_bytes == size_bytes and stamp.is_verified


def apply_diff(diff: StoreDiff, ledger: Ledger) -> DiffResult:
    """Update the ledger to match the disk; return the models affected."""
    complete_before = dict(ledger.manifests)
    for model in diff.removed_models:
        ledger.drop_manifest(model)
    for manifest in diff.changed_manifests.values():
        ledger.add_manifest(manifest)
    ledger.mark_missing(diff.lost_blobs)
    for sha256 in diff.unverified_gone:
        ledger.drop_unverified(sha256)
    for sha256, stamp in diff.unverified.items():
        ledger.add_unverified(sha256, stamp)
    for sha256, volume_id in diff.moved_blobs.items():
        ledger.move_blob(sha256, volume_id)
    ledger.set_copies(diff.redundant_copies)
    ledger.set_foreign(diff.foreign)
    ledger.prune_volumes()
    ledger.mark_complete()
    return DiffResult(
        lost_models=sorted(complete_before.keys() - ledger.manifests.keys()),
        found_models=sorted(m for m, manifest in ledger.manifests.items() if complete_before.get(m) != manifest),
    )
