"""Which models are complete, and what a lost or a returned blob changes."""

from __future__ import annotations

from shoal_common.messages.manifest import Manifest
from shoal_storage.ledger.ledger import Ledger


def mark_incomplete(blobs: set[str], ledger: Ledger) -> list[str]:
    """Drop lost blobs and mark the models that need them incomplete; return those models, `org/name@commit`."""
    for sha256 in blobs:
        ledger.blobs.pop(sha256, None)
    ledger.sha256_by_git_name = {
        git: sha256 for git, sha256 in ledger.sha256_by_git_name.items() if sha256 not in blobs
    }
    lost = sorted(model for model, m in ledger.manifests.items() if not is_complete(m, ledger))
    for model in lost:
        ledger.incomplete[model] = ledger.manifests.pop(model)
    return lost


def mark_complete(ledger: Ledger) -> list[str]:
    """Mark incomplete models complete once all their blobs are present; return them, `org/name@commit`.

    Models being downloaded are left out: the download seals them as its own last step.
    """
    candidates = {model: m for model, m in ledger.incomplete.items() if model not in ledger.reservations}
    completed = sorted(model for model, m in candidates.items() if is_complete(m, ledger))
    for model in completed:
        ledger.manifests[model] = ledger.incomplete.pop(model)
    return completed


def is_complete(manifest: Manifest, ledger: Ledger) -> bool:
    """Whether every file of a manifest is a blob of the right size, in the store or in a library."""
    return all(ledger.blob_size(f.sha256) == f.size_bytes for f in manifest.files)


def recompute_completeness(ledger: Ledger) -> tuple[list[str], list[str]]:
    """After library blobs came or went, recompute the store's models; return those now incomplete, now complete."""
    return mark_incomplete(set(), ledger), mark_complete(ledger)


def manifests_with_blob(sha256: str, ledger: Ledger) -> list[Manifest]:
    """Return the manifests, of complete and incomplete models, that contain a blob."""
    return [m for m in ledger.stored_manifests.values() if sha256 in m.blob_sizes]
