"""What corrupt, missing or restored blobs mean for models, and which blobs to verify next. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal_common.messages.records import Manifest
from shoal_storage.decide import Ledger, referenced


def lose(blobs: set[str], ledger: Ledger) -> list[str]:
    """Drop lost blobs and mark the models that need them incomplete; return those models, `org/name@commit`."""
    for sha256 in blobs:
        ledger.blobs.pop(sha256, None)
    ledger.git = {git: sha256 for git, sha256 in ledger.git.items() if sha256 not in blobs}
    lost = sorted(model for model, m in ledger.manifests.items() if not is_whole(m, ledger))
    for model in lost:
        ledger.broken[model] = ledger.manifests.pop(model)
    return lost


def mend(ledger: Ledger) -> list[str]:
    """Mark incomplete models complete once all their blobs are present; return them, `org/name@commit`.

    Models being downloaded are left out: the download seals them as its own last step.
    """
    candidates = {model: m for model, m in ledger.broken.items() if model not in ledger.promised}
    completed = sorted(model for model, m in candidates.items() if is_whole(m, ledger))
    for model in completed:
        ledger.manifests[model] = ledger.broken.pop(model)
    return completed


def is_whole(manifest: Manifest, ledger: Ledger) -> bool:
    """Whether every file of a manifest is a blob of the right size, in the store or in a library."""
    return all(ledger.bytes_of(f.sha256) == f.size_bytes for f in manifest.files)


def weigh(ledger: Ledger) -> tuple[list[str], list[str]]:
    """After library blobs came or went, recompute the store's models; return those now incomplete, now complete."""
    return lose(set(), ledger), mend(ledger)


def having(sha256: str, ledger: Ledger) -> list[Manifest]:
    """Return the manifests, of complete and incomplete models, that contain a blob."""
    return [m for m in ledger.on_disk.values() if sha256 in m.blob_sizes]


def of_no_more_use(ledger: Ledger) -> set[str]:
    """Return quarantined blobs that no manifest or download needs, or whose good bytes have arrived."""
    needed = referenced(ledger)
    return {blob for blob in ledger.quarantined if blob not in needed or blob in ledger.blobs}


def due(
    blobs: Iterable[str], verified_s: Mapping[str, float], begin: str, now_s: float, again_after_s: float
) -> list[str]:
    """Return blobs last verified at least `max_age_s` ago, longest ago first.

    Blobs never verified come first, in name order from `first_name` on, wrapping around: verification times are
    kept in memory only, so restarts that always began at the same name would never reach the others.
    """
    pending = [b for b in blobs if b not in verified_s or now_s - verified_s[b] >= again_after_s]
    return sorted(pending, key=lambda b: (verified_s.get(b, float("-inf")), b < begin, b))
