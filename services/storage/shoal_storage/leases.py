"""When a lease lives and when it has ended, and how a lease is told of. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from shoal_common.messages.records import LeaseState

LEASES_AT_MOST = 256
"""On one node, which runs a few stages and what its people start."""
GRACE_S = 30.0
"""From its making until somebody has to hold its lock."""


class Lease(msgspec.Struct):
    """Somebody's use of a model (`org/name@commit`), with a view of its own."""

    id: str
    model: str
    holder: str
    instance: str
    since_s: float
    """Seconds since 1970."""
    files: dict[str, str]
    """sha256 of each file in its view, by path."""
    grace_until_s: float
    """Of a clock that never goes back: until then it lives though nobody has taken its lock yet."""
    held: bool = False
    """Whether somebody was seen to hold its lock."""
    pid: int = 0
    """Of one who does; 0 where the system does not say."""
    arriving: frozenset[str] = frozenset()
    """Of a part: those of its blobs of which only leaves are needed. Of use only while its view is made."""

    @property
    def blobs(self) -> set[str]:
        """What its view consists of, by sha256."""
        return set(self.files.values())


def grace_left_s(since_s: float, now_s: float) -> float:
    """Seconds of grace for a lease that a start finds: never more than a new one has, whatever clocks say."""
    return min(max(GRACE_S - (now_s - since_s), 0.0), GRACE_S)


def has_ended(lease: Lease, held: bool, now_s: float) -> bool:
    """Whether a lease that was looked at now, `held` or not, is over: let go, or never taken up."""
    return not held and (lease.held or now_s >= lease.grace_until_s)


def words_of(lease: Lease) -> str:
    """The holder for people."""
    return f"{lease.holder} (pid {lease.pid})" if lease.pid else lease.holder


def told(leases: Iterable[Lease]) -> list[LeaseState]:
    """What the cluster is told of leases, oldest first."""
    return [
        LeaseState(id=x.id, model=x.model, holder=x.holder, since_s=round(x.since_s, 3), pid=x.pid)
        for x in sorted(leases, key=lambda x: (x.since_s, x.id))
    ]
