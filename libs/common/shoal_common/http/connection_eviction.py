"""Which connection makes way for a new one when the limits are reached. Pure.

Idle connections go first, the longest idle first, of the address that has most connections. If none is idle, one
whose client is waited for goes: it does not read, or its body is still arriving. So clients that read are not kept
out by those that do not, however many they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from shoal_common.http.bounds import HttpBounds

STALL_TIMEOUT_S = 1.0
"""A client that has not read, or whose body has been arriving, for this long may be disconnected."""

REFUSE_NEW: Final = "no room"


class ConnectionInfo(msgspec.Struct, frozen=True):
    """The facts about a connection that decide."""

    host: str
    idle_s: float | None = None
    """Seconds without a request; None while one is answered."""
    stalled_s: float | None = None
    """Seconds the client has not read, or since it began to send a body; None if it is not waited for."""


def connection_to_evict(
    host: str, others: Sequence[ConnectionInfo], bounds: HttpBounds
) -> int | Literal["no room"] | None:
    """Return the index of the connection to evict for a new one from this address.

    None if no connection has to go; REFUSE_NEW if the new one has to.
    """
    from_host = Counter(connection.host for connection in others)
    if from_host[host] >= bounds.max_per_address:
        return _longest_idle([i for i, connection in enumerate(others) if connection.host == host], others)
    if len(others) < bounds.max_connections:
        return None
    by_share = sorted(range(len(others)), key=lambda i: -from_host[others[i].host])
    largest_share = from_host[others[by_share[0]].host]
    idle = [i for i in by_share if others[i].idle_s is not None]
    if idle:
        share = from_host[others[idle[0]].host]
        return _longest_idle([i for i in idle if from_host[others[i].host] == share], others)
    return _longest_idle([i for i in by_share if from_host[others[i].host] == largest_share], others)


def _longest_idle(candidates: Sequence[int], others: Sequence[ConnectionInfo]) -> int | Literal["no room"]:
    """Return the longest idle connection, else the longest stalled one, else REFUSE_NEW."""
    idle = [(waited_s, i) for i in candidates if (waited_s := others[i].idle_s) is not None]
    stalled = [
        (waited_s, i)
        for i in candidates
        if (waited_s := others[i].stalled_s) is not None and waited_s >= STALL_TIMEOUT_S
    ]
    longest = max(idle, default=None) or max(stalled, default=None)
    return REFUSE_NEW if longest is None else longest[1]
