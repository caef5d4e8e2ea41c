"""What speaks for keeping a model: pins, leases, and when it was last used."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final

from msgspec import structs

from shoal_common.names import ModelId
from shoal_storage.ledger.lease import ModelLease


class ModelUses:
    """The pins, live leases and last uses of a store's models (`org/name@commit`)."""

    pinned: Final[Set[ModelId]]
    """Models that people pinned."""
    leases: Final[Mapping[str, ModelLease]]
    """Live leases, by id."""
    last_uses: Final[Mapping[ModelId, float]]
    """Time of each model's last use, in Unix seconds; for one never used, when it arrived."""

    def __init__(self) -> None:
        self.pinned = self._pinned = set[ModelId]()
        self.leases = self._leases = dict[str, ModelLease]()
        self.last_uses = self._last_uses = dict[ModelId, float]()

    def pin(self, model: ModelId) -> None:
        """Record that a model is pinned."""
        self._pinned.add(model)

    def unpin(self, model: ModelId) -> None:
        """Record that a model is not pinned."""
        self._pinned.discard(model)

    def record_use(self, model: ModelId, used_s: float) -> None:
        """Record when a model was used; at first, when it arrived."""
        self._last_uses[model] = used_s

    def forget_use(self, model: ModelId) -> None:
        """Forget when a deleted model was used."""
        self._last_uses.pop(model, None)

    def add_lease(self, lease: ModelLease) -> None:
        """Add a lease that was granted, or found at start."""
        self._leases[lease.id] = lease

    def record_lock(self, lease_id: str, held: bool, pid: int) -> ModelLease:
        """Record whether a lease's lock is held now, and by which process. Returns the lease."""
        lease = self._leases[lease_id]
        self._leases[lease_id] = changed = structs.replace(lease, held=lease.held or held, pid=pid)
        return changed

    def end_lease(self, lease_id: str) -> ModelLease | None:
        """Drop a lease. Returns it; None if there was none."""
        return self._leases.pop(lease_id, None)
