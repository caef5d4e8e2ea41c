"""Leases: when one is alive, when it has ended, and its published form. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from shoal_common.messages.storage import LeaseState
from shoal_common.names import ModelId

MAX_LEASES = 256
"""Per node; it runs a few stages and what people start by hand."""
LOCK_DEADLINE_S = 30.0
"""Seconds after creation by which the holder has to take the lock."""


class ModelLease(msgspec.Struct, frozen=True):
    """A holder's use of a model (`org/name@commit`), with a view of its own."""

    id: str
    model: ModelId
    holder: str
    instance: str
    since_s: float
    """Seconds since 1970."""
    files: Mapping[str, str]
    """sha256 of each file in its view, by path."""
    grace_until_s: float
    """Monotonic time until which the lease lives though nobody has taken its lock yet."""
    held: bool = False
    """Whether its lock was ever seen held."""
    pid: int = 0
    """A process that holds the lock; 0 where the system does not tell."""
    partial_blobs: frozenset[str] = frozenset()
    """Of a shard, the blobs of which only some leaves are needed. Used only while its view is built."""

    @property
    def blobs(self) -> set[str]:
        """The blobs in its view, by sha256."""
        return set(self.files.values())


def grace_left_s(since_s: float, now_s: float) -> float:
    """Return the seconds of grace left for a lease found at startup: at most `LOCK_DEADLINE_S`, by any clock."""
    return min(max(LOCK_DEADLINE_S - (now_s - since_s), 0.0), LOCK_DEADLINE_S)


def has_ended(lease: ModelLease, held: bool, now_s: float) -> bool:
    """Return whether a lease is over, its lock being `held` now or not: released, or never taken up in time."""
    return not held and (lease.held or now_s >= lease.grace_until_s)


def describe_holder(lease: ModelLease) -> str:
    """Return the holder as text for people."""
    return f"{lease.holder} (pid {lease.pid})" if lease.pid else lease.holder


def to_lease_states(leases: Iterable[ModelLease]) -> list[LeaseState]:
    """Return the published state of leases, oldest first."""
    return [
        LeaseState(id=x.id, model=x.model, holder=x.holder, since_s=round(x.since_s, 3), pid=x.pid)
        for x in sorted(leases, key=lambda x: (x.since_s, x.id))
    ]
