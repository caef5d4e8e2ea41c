"""What follows when a blob turns out corrupt or missing: publish it, and schedule the next check."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping

from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.messages.instances import InstanceSpec
from shoal_common.service import ServiceContext
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import referenced_blobs
from shoal_storage.publisher import StatePublisher
from shoal_storage.store.commit import delete_quarantined
from shoal_storage.store.store import Store


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


class IntegrityPublisher:
    """Unpublishes models whose bytes can no longer be trusted."""

    def __init__(
        self, context: ServiceContext, store: Store, ledger: Ledger, specs: KvMirror, publisher: StatePublisher
    ) -> None:
        self._node, self._store, self._ledger = context.node, store, ledger
        self._specs, self._publisher = specs, publisher

    async def unpublish(self, models: Iterable[str]) -> list[str]:
        """Unpublish models (`org/name@commit`); return the instances with stages of them on this node."""
        await drop_obsolete_quarantine(self._store, self._ledger)
        lost = set(models)
        for model in sorted(lost):
            await self._publisher.unpublish_model(model)
        return self.instances_using(lost)

    def instances_using(self, models: Collection[str]) -> list[str]:
        """Return the instances with stages of these models on this node."""
        return [
            spec.id
            for _, spec in self._specs.items("instance.", InstanceSpec)
            if spec.model in models and any(s.node == self._node for s in spec.stages)
        ]


async def drop_obsolete_quarantine(store: Store, ledger: Ledger) -> None:
    """Delete quarantined files that nothing needs or that good bytes have replaced. Within the critical section."""
    for sha256 in obsolete_quarantine(ledger):
        await asyncio.to_thread(delete_quarantined, store, sha256)
        ledger.drop_quarantined(sha256)
