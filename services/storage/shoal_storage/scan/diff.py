"""Compare a scan with the ledger, and apply the difference. Pure."""

from __future__ import annotations

import msgspec

from shoal_common.messages.manifest import Manifest
from shoal_storage.ledger.completeness import lose, mend
from shoal_storage.ledger.entries import Stamp, Unknown
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.scan.scanner import Seen


class Differences(msgspec.Struct, frozen=True):
    """Changes on the disk that the ledger lacks. Blobs by sha256, models as `org/name@commit`."""

    gone: set[str]
    """Blobs whose file is gone or was replaced."""
    replaced: set[str]
    """Those of them that were replaced: the new file is in `unverified`."""
    unproven: dict[str, Stamp]
    """Files to hash: in the place of an unknown blob, or in that of a known blob whose file they are not."""
    moved: dict[str, str]
    """Intact blobs now on another volume ("" for the store itself): the copy in the ledger is gone."""
    doubles: dict[str, dict[str, int]]
    """All blobs that are present more than once."""
    vanished: set[str]
    """Unverified files that are gone."""
    removed: set[str]
    """Models whose manifest is gone."""
    added: dict[str, Manifest]
    """Manifests that are new or changed."""
    unlinked: set[str]
    """Complete models with view files that are missing or are not the blobs."""
    unknown: Unknown

    def any_in(self, ledger: Ledger) -> bool:
        """Return whether anything differs from the ledger."""
        changes = (self.gone, self.unproven, self.moved, self.vanished, self.removed, self.added, self.unlinked)
        return any(changes) or self.unknown != ledger.unknown or self.doubles != ledger.doubles


class Followed(msgspec.Struct, frozen=True):
    """Models (`org/name@commit`) affected by an update of the ledger."""

    lost: list[str]
    """Complete before, and now incomplete or gone."""
    found: list[str]
    """Complete now, and before incomplete, absent or with another manifest."""


def believed(stamp: Stamp, listed: bool) -> bool:
    """Return whether startup accepts a file as the blob it is named for, without hashing it.

    `has_leaf_hash_file`: its leaf hash file names its mtime. That holds in a store that was copied whole, with
    its mtimes, to another disk, where no file carries its verification stamp.
    """
    return stamp.proven or listed


def differences(ledger: Ledger, seen: Seen) -> Differences:
    """Return how a scan of the disk differs from the ledger."""
    intact = {b for b, size in ledger.blobs.items() if b in seen.blobs and _is_intact(size, seen.blobs[b])}
    gone = ledger.blobs.keys() - intact
    unproven = {
        b: stamp
        for b, stamp in seen.blobs.items()
        if b not in intact and not (b in ledger.unproven and stamp.same_file(ledger.unproven[b]))
    }
    on_disk = ledger.on_disk
    return Differences(
        gone=gone,
        replaced=gone & seen.blobs.keys(),
        unproven=unproven,
        moved={b: seen.blobs[b].further for b in intact if seen.blobs[b].further != ledger.where.get(b, "")},
        doubles={b: copies for b, copies in seen.doubles.items() if b in intact},
        vanished=ledger.unproven.keys() - seen.blobs.keys(),
        removed=on_disk.keys() - seen.manifests.keys() - seen.unreadable,
        added={m: manifest for m, manifest in seen.manifests.items() if on_disk.get(m) != manifest},
        unlinked=seen.unlinked & ledger.manifests.keys(),
        unknown=seen.unknown,
    )


def _is_intact(size_bytes: int, stamp: Stamp) -> bool:
    # A file without its verification stamp was replaced or written to.
    return stamp.size_bytes == size_bytes and stamp.proven


def follow(diff: Differences, ledger: Ledger) -> Followed:
    """Update the ledger to match the disk; return the models affected."""
    complete_before = dict(ledger.manifests)
    for model in diff.removed:
        ledger.manifests.pop(model, None)
        ledger.broken.pop(model, None)
    for model, manifest in diff.added.items():
        ledger.manifests.pop(model, None)
        ledger.broken[model] = manifest
    for sha256 in diff.vanished:
        del ledger.unproven[sha256]
    ledger.unproven.update(diff.unproven)
    ledger.where.update(diff.moved | {b: stamp.further for b, stamp in diff.unproven.items()})
    ledger.doubles = diff.doubles
    ledger.wrong = {b: s for b, s in ledger.wrong.items() if b in ledger.unproven and s.same_file(ledger.unproven[b])}
    ledger.unknown = diff.unknown
    lose(diff.gone, ledger)
    ledger.forget_places()
    mend(ledger)
    return Followed(
        lost=sorted(complete_before.keys() - ledger.manifests.keys()),
        found=sorted(m for m, manifest in ledger.manifests.items() if complete_before.get(m) != manifest),
    )
