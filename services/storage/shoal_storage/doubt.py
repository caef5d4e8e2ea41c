"""What follows from blobs that are no longer what their names say, or are again, and which to look at next. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal_common.messages.records import Manifest
from shoal_storage.decide import Ledger, referenced


def lose(blobs: set[str], ledger: Ledger) -> list[str]:
    """Blobs have gone: the models that need them are broken. Returns those that were whole, `org/name@commit`."""
    for sha256 in blobs:
        ledger.blobs.pop(sha256, None)
    ledger.git = {git: known for git, known in ledger.git.items() if known not in blobs}
    lost = sorted(model for model, m in ledger.manifests.items() if not is_whole(m, ledger))
    for model in lost:
        ledger.broken[model] = ledger.manifests.pop(model)
    return lost


def mend(ledger: Ledger) -> list[str]:
    """Broken models all of whose blobs are here are whole. Returns them, `org/name@commit`.

    Not those that a fetch under way is for: sealing them is its own last step.
    """
    candidates = {model: m for model, m in ledger.broken.items() if model not in ledger.promised}
    whole = sorted(model for model, m in candidates.items() if is_whole(m, ledger))
    for model in whole:
        ledger.manifests[model] = ledger.broken.pop(model)
    return whole


def is_whole(manifest: Manifest, ledger: Ledger) -> bool:
    """Whether every file of a manifest is a blob of its size, of the store or adopted."""
    return all(ledger.bytes_of(f.sha256) == f.size_bytes for f in manifest.files)


def weigh(ledger: Ledger) -> tuple[list[str], list[str]]:
    """Adopted blobs have come or gone: which models of the store that breaks, and which it makes whole."""
    return lose(set(), ledger), mend(ledger)


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
