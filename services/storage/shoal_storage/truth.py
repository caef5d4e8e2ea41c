"""How what the ledger says differs from what was seen on the disk, and what follows for the ledger. Pure.

The disk is right. Nothing is deleted because of a difference: models are announced or taken back, files that somebody
put in a blob's place wait to be hashed.
"""

from __future__ import annotations

import msgspec

from shoal_common.messages.records import Manifest
from shoal_storage.decide import Ledger, Stamp, Unknown
from shoal_storage.doubt import lose, mend
from shoal_storage.scan import Seen

PROVEN_MODE = 0o444


class Differences(msgspec.Struct, frozen=True):
    """What changed under us. Blobs by sha256, models as `org/name@commit`."""

    gone: set[str]
    """Blobs whose file has gone, or is another one now."""
    replaced: set[str]
    """Those of them that are another file: it is in `unproven`."""
    unproven: dict[str, Stamp]
    """Files that have to be hashed: in the place of no blob we know, or of one that they are not."""
    moved: dict[str, str]
    """Blobs that are in another root ("" for the store) than they were, intact: the copy that was known has gone."""
    doubles: dict[str, dict[str, int]]
    """All blobs that are here more than once."""
    vanished: set[str]
    """Unproven files that are there no more."""
    removed: set[str]
    """Models whose manifest has gone."""
    added: dict[str, Manifest]
    """Manifests that are new, or say something else than they did."""
    unlinked: set[str]
    """Whole models of whose view files are missing, or are not the blobs."""
    unknown: Unknown

    def any_in(self, ledger: Ledger) -> bool:
        """Whether anything differs at all."""
        parts = (self.gone, self.unproven, self.moved, self.vanished, self.removed, self.added, self.unlinked)
        return any(parts) or self.unknown != ledger.unknown or self.doubles != ledger.doubles


class Followed(msgspec.Struct, frozen=True):
    """What the ledger's following the disk means for models, `org/name@commit`."""

    lost: list[str]
    """Whole before, and not now, or not here any more."""
    found: list[str]
    """Whole now, and not before, or with another manifest."""


def believed(stamp: Stamp, listed: bool) -> bool:
    """Whether a start takes a file for the blob that it is called, without hashing it.

    `listed`: its leaves are, with its time (`leaves.proves`). That is so in a store that was copied whole, times and
    all, to another disk, where no file shows its proof.
    """
    return stamp.proven or listed


def differences(ledger: Ledger, seen: Seen) -> Differences:
    """What is on the disk and not in the ledger, and the other way round."""
    here = {b for b, size in ledger.blobs.items() if b in seen.blobs and _is_it(size, seen.blobs[b])}
    gone = ledger.blobs.keys() - here
    unproven = {
        b: stamp
        for b, stamp in seen.blobs.items()
        if b not in here and not (b in ledger.unproven and stamp.same_file(ledger.unproven[b]))
    }
    on_disk = ledger.on_disk
    return Differences(
        gone=gone,
        replaced=gone & seen.blobs.keys(),
        unproven=unproven,
        moved={b: seen.blobs[b].further for b in here if seen.blobs[b].further != ledger.where.get(b, "")},
        doubles={b: copies for b, copies in seen.doubles.items() if b in here},
        vanished=ledger.unproven.keys() - seen.blobs.keys(),
        removed=on_disk.keys() - seen.manifests.keys() - seen.unreadable,
        added={m: manifest for m, manifest in seen.manifests.items() if on_disk.get(m) != manifest},
        unlinked=seen.unlinked & ledger.manifests.keys(),
        unknown=seen.unknown,
    )


def _is_it(size_bytes: int, stamp: Stamp) -> bool:
    # A blob that shows no proof is one that somebody replaced or wrote to.
    return stamp.size_bytes == size_bytes and stamp.proven


def follow(found: Differences, ledger: Ledger) -> Followed:
    """Make the ledger say what was seen."""
    whole_before = dict(ledger.manifests)
    for model in found.removed:
        ledger.manifests.pop(model, None)
        ledger.broken.pop(model, None)
    for model, manifest in found.added.items():
        ledger.manifests.pop(model, None)
        ledger.broken[model] = manifest
    for sha256 in found.vanished:
        del ledger.unproven[sha256]
    ledger.unproven.update(found.unproven)
    ledger.where.update(found.moved | {b: stamp.further for b, stamp in found.unproven.items()})
    ledger.doubles = found.doubles
    ledger.wrong = {b: s for b, s in ledger.wrong.items() if b in ledger.unproven and s.same_file(ledger.unproven[b])}
    ledger.unknown = found.unknown
    lose(found.gone, ledger)
    ledger.forget_places()
    mend(ledger)
    return Followed(
        lost=sorted(whole_before.keys() - ledger.manifests.keys()),
        found=sorted(m for m, manifest in ledger.manifests.items() if whole_before.get(m) != manifest),
    )
