"""A ledger in a given state, reached by its own methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_storage.ledger.entries import PartialBlobInfo, Shard
from shoal_storage.ledger.ledger import Ledger


def build_ledger(
    blobs: Mapping[str, int] | None = None,
    *,
    manifests: Iterable[Manifest] = (),
    partials: Mapping[str, PartialBlobInfo] | None = None,
    shards: Iterable[Shard] = (),
    reservations: Mapping[ModelId, Iterable[str]] | None = None,
    last_wanted_s: Mapping[ModelId, float] | None = None,
    ended_reservations: Iterable[ModelId] = (),
    last_uses: Mapping[ModelId, float] | None = None,
    pinned: Iterable[ModelId] = (),
) -> Ledger:
    """Return a ledger with these contents; models that lack a blob are incomplete."""
    ledger = Ledger()
    for blob, size_bytes in (blobs or {}).items():
        ledger.add_blob(blob, size_bytes)
    for manifest in manifests:
        ledger.add_manifest(manifest)
    ledger.mark_complete()
    for blob, partial in (partials or {}).items():
        ledger.arrivals.add_partial(blob, partial)
    for shard in shards:
        ledger.add_shard(shard)
    for model, counted_on in (reservations or {}).items():
        ledger.arrivals.reserve(model, counted_on)
    for model, wanted_s in (last_wanted_s or {}).items():
        ledger.arrivals.record_wanted(model, wanted_s)
    for model in ended_reservations:
        ledger.arrivals.abandon_reservation(model)
    for model, used_s in (last_uses or {}).items():
        ledger.uses.record_use(model, used_s)
    for model in pinned:
        ledger.uses.pin(model)
    return ledger
