"""What follows from a blob that is no longer what its name says, and which to look at next. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal_common.messages.records import Manifest
from shoal_storage.decide import Ledger, referenced


def lose(sha256: str, ledger: Ledger) -> list[str]:
    """A blob has gone: the models that need it are broken. Returns those that were whole, `org/name@commit`."""
    ledger.blobs.pop(sha256, None)
    ledger.git = {git: known for git, known in ledger.git.items() if known != sha256}
    lost = sorted(m.model for m in ledger.manifests.values() if sha256 in m.blob_sizes)
    for model in lost:
        ledger.broken[model] = ledger.manifests.pop(model)
    return lost


def weigh(ledger: Ledger) -> tuple[list[str], list[str]]:
    """Adopted blobs have come or gone: which models of the store that breaks, and which it makes whole."""

    def is_whole(manifest: Manifest) -> bool:
        return all(ledger.bytes_of(blob) == size for blob, size in manifest.blob_sizes.items())

    broken = sorted(model for model, m in ledger.manifests.items() if not is_whole(m))
    whole = sorted(model for model, m in ledger.broken.items() if is_whole(m))
    for model in broken:
        ledger.broken[model] = ledger.manifests.pop(model)
    for model in whole:
        ledger.manifests[model] = ledger.broken.pop(model)
    return broken, whole


def having(sha256: str, ledger: Ledger) -> list[Manifest]:
    """The manifests, of whole models and of broken ones, that need a blob."""
    return [m for m in ledger.on_disk.values() if sha256 in m.blob_sizes]


def of_no_more_use(ledger: Ledger) -> set[str]:
    """Blobs set aside that no manifest and no fetch wants back, or that have come back."""
    wanted = referenced(ledger)
    return {blob for blob in ledger.quarantined if blob not in wanted or blob in ledger.blobs}


def due(
    blobs: Iterable[str], verified_s: Mapping[str, float], begin: str, now_s: float, again_after_s: float
) -> list[str]:
    """Blobs that were verified `again_after_s` ago or longer, longest ago first.

    Those never verified come before, in the order of their names from `begin` on and around: what was verified is
    known in memory only, and a start that always began with the same names would never come to the others.
    """
    late = [b for b in blobs if b not in verified_s or now_s - verified_s[b] >= again_after_s]
    return sorted(late, key=lambda b: (verified_s.get(b, float("-inf")), b < begin, b))
