"""What follows when blobs turn out corrupt or missing: what quarantine keeps, and which instances are affected."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping

from shoal_common.messages.instances import InstanceSpec
from shoal_common.names import ModelId
from shoal_storage.context import StorageContext
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import referenced_blobs
from shoal_storage.section import Held
from shoal_storage.store.commit import delete_quarantined


def obsolete_quarantine(ledger: Ledger) -> set[str]:
    """Return quarantined blobs that no manifest or download needs, or whose good bytes have arrived."""
    needed = referenced_blobs(ledger)
    return {blob for blob in ledger.quarantined if blob not in needed or blob in ledger.blobs}


def next_to_scrub(
    blobs: Iterable[str], verified_s: Mapping[str, float], first_name: str, now_s: float, max_age_s: float
) -> list[str]:
    """Return blobs last verified at least `max_age_s` ago, longest ago first.

    Blobs never verified come first, in name order from `first_name` on, wrapping around: verification times are
    kept in memory only, so restarts that always began at the same name would never reach the others.
    """
    pending = [b for b in blobs if b not in verified_s or now_s - verified_s[b] >= max_age_s]
    return sorted(pending, key=lambda b: (verified_s.get(b, float("-inf")), b < first_name, b))


async def drop_obsolete_quarantine(held: Held, context: StorageContext) -> None:
    """Delete quarantined files that nothing needs or that good bytes have replaced."""
    held.require()
    ledger = context.ledger
    for sha256 in obsolete_quarantine(ledger):
        await asyncio.to_thread(delete_quarantined, context.store, sha256)
        ledger.drop_quarantined(sha256)


def instances_using(context: StorageContext, models: Collection[ModelId]) -> list[str]:
    """Return the instances with stages of these models (`org/name@commit`) on this node."""
    return [
        spec.id
        for _, spec in context.specs.items("instance.", InstanceSpec)
        if spec.model in models and any(s.node == context.node for s in spec.stages)
    ]
