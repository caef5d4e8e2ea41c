"""Whose place a newcomer takes when there are as many connections as there may be. Pure.

Idle connections go first, the longest idle first, of the address that has the most. Where none is idle, one whose
peer does not take what it asked for goes. So whoever reads is not kept out by those who do not, however many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

MAX_CONNECTIONS = 256
MAX_PER_ADDRESS = 128
"""Several nodes may share an address, each of whose fetchers has up to 32 connections."""
STALLED_S = 1.0
"""A peer that has been waited for so long without a pause may lose its place."""

NO_ROOM: Final = "no room"


class Seen(msgspec.Struct, frozen=True):
    """A connection."""

    host: str
    idle_s: float | None = None
    """For how long it has had no request; None while one is answered."""
    stalled_s: float | None = None
    """For how long its peer has been waited for to take what was sent; None when it is not."""


def make_room(host: str, others: Sequence[Seen]) -> int | Literal["no room"] | None:
    """Which of the others has to go for a newcomer from this address: its place in the sequence.

    None when there is room for both; NO_ROOM when the newcomer has to go itself.
    """
    from_host = Counter(seen.host for seen in others)
    if from_host[host] >= MAX_PER_ADDRESS:
        return _first([i for i, seen in enumerate(others) if seen.host == host], others)
    if len(others) < MAX_CONNECTIONS:
        return None
    by_share = sorted(range(len(others)), key=lambda i: -from_host[others[i].host])
    most = from_host[others[by_share[0]].host]
    idle = [i for i in by_share if others[i].idle_s is not None]
    if idle:
        share = from_host[others[idle[0]].host]
        return _first([i for i in idle if from_host[others[i].host] == share], others)
    return _first([i for i in by_share if from_host[others[i].host] == most], others)


def _first(candidates: Sequence[int], others: Sequence[Seen]) -> int | Literal["no room"]:
    """The longest idle one; else the one that has been waited for longest; else none."""
    idle = [(seen_s, i) for i in candidates if (seen_s := others[i].idle_s) is not None]
    stalled = [(seen_s, i) for i in candidates if (seen_s := others[i].stalled_s) is not None and seen_s >= STALLED_S]
    found = max(idle, default=None) or max(stalled, default=None)
    return NO_ROOM if found is None else found[1]
