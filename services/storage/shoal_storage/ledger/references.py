"""Which blobs are needed by what, and what a deletion frees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal_common.messages.manifest import Manifest
from shoal_common.models.layer_tensors import check_layers, covers
from shoal_common.names import ModelId, ModelRef, commit_of, repo_of
from shoal_storage.ledger.entries import Shard
from shoal_storage.ledger.ledger import Ledger


def referenced_blobs(ledger: Ledger, ignored: Iterable[str] = ()) -> set[str]:
    """Return the blobs that a manifest, a running fetch or a lease needs. The `ignored` models do not count."""
    ignored_models = set(ignored)
    needed = {b for model, m in ledger.stored_manifests.items() if model not in ignored_models for b in m.blob_sizes}
    for model, blobs in ledger.arrivals.reservations.items():
        if model not in ignored_models:
            needed |= blobs
    for lease in ledger.uses.leases.values():  # readers, whatever happens to the model's manifest
        needed |= lease.blobs
    for blob, partial in ledger.arrivals.partials.items():
        if partial.models - ignored_models:
            needed.add(blob)
    return needed


def blobs_of_model(model: ModelId, ledger: Ledger) -> set[str]:
    """Return every blob, present or arriving, that is here for a model."""
    manifest = ledger.stored_manifests.get(model) or ledger.deleting.get(model)
    blobs = set(manifest.blob_sizes) if manifest else set()
    blobs |= ledger.arrivals.reservations.get(model, frozenset())
    return blobs | {b for b, p in ledger.arrivals.partials.items() if model in p.models}


def blobs_freed_by(model: ModelId, ledger: Ledger) -> list[str]:
    """Return the blobs that only this model needs: those that deleting it deletes."""
    return sorted(blobs_of_model(model, ledger) - referenced_blobs(ledger, ignored=[model]))


def damaged_models(ledger: Ledger) -> list[ModelId]:
    """Return the incomplete models that do not become complete by the hashing of files that are here."""
    to_be_hashed = ledger.unverified.keys() - ledger.corrupt
    present = ledger.blobs.keys() | ledger.libraries.blobs.keys() | to_be_hashed
    return sorted(model for model, m in ledger.incomplete.items() if not m.blob_sizes.keys() <= present)


def bytes_of_paused_models(ledger: Ledger) -> dict[ModelId, int]:
    """Return the bytes held for each paused model: its reservations, and present blobs that only it needs."""
    result = {}
    for model in sorted(ledger.arrivals.paused_models & ledger.arrivals.models):
        present_bytes = sum(ledger.blobs.get(blob, 0) for blob in blobs_freed_by(model, ledger))
        partials = [p.with_only_model(model) for p in ledger.arrivals.partials.values() if model in p.models]
        result[model] = present_bytes + sum(p.reserved_bytes for p in partials)
    return result


def manifests_with_blob(sha256: str, ledger: Ledger) -> list[Manifest]:
    """Return the manifests, of complete and incomplete models, that contain a blob."""
    return [m for m in ledger.stored_manifests.values() if sha256 in m.blob_sizes]


def leftover_blobs(deleted: Manifest, ledger: Ledger) -> list[str]:
    """Return the blobs of a model that nothing else needs, after a crash interrupted its deletion."""
    return sorted({b for b in deleted.blob_sizes if b in ledger.blobs} - referenced_blobs(ledger))


def arriving_models(repo: str, revision: str, ledger: Ledger) -> list[ModelId]:
    """Return the models of a repo (`org/name@commit`) that have a reservation and are not complete.

    The branch they were requested under is not known here: a revision matches by commit only.
    """
    wanted = {m for m in ledger.arrivals.models if repo_of(m) == repo and m not in ledger.manifests}
    return sorted(m for m in wanted if revision in ("", commit_of(m)))


def matching_manifests(repo: str, revision: str, manifests: Iterable[Manifest]) -> list[Manifest]:
    """Return the manifests that `org/name` (all commits) or `org/name@revision` names."""
    matches = [m for m in manifests if m.repo == repo]
    if revision:
        matches = [m for m in matches if m.commit == revision or revision in m.revisions]
    return sorted(matches, key=lambda m: m.commit)


def find_shard(ref: ModelRef, layers: Sequence[int], ledger: Ledger) -> Shard | None:
    """Return the shard that suffices for a stage with these layers; None if there is none, or for no layers."""
    if not layers:
        return None
    check_layers(layers)
    candidates = matching_manifests(ref.repo, ref.revision, (p.manifest for p in ledger.shards.values()))
    sufficient = [p for m in candidates if covers((p := ledger.shards[m.model]).layers, layers)]
    return sufficient[-1] if sufficient else None


def is_offered_by_library(manifest: Manifest, ledger: Ledger) -> bool:
    """Whether a library offers exactly this model, under all of its names."""
    library_model = ledger.offered_library_models.get(manifest.model)
    if library_model is None or not set(manifest.revisions) <= {*library_model.manifest.revisions, manifest.commit}:
        return False
    return {f.path: f.sha256 for f in manifest.files} == {f.path: f.sha256 for f in library_model.manifest.files}
