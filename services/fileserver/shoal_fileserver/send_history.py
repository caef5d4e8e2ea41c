"""How often this node has sent each leaf, and which leaves are in flight; it chooses from that what to send next.

Kept in memory, for some blobs and a while: what is dropped costs at most a second copy before another leaf's first.
"""

from __future__ import annotations

import random
from collections import OrderedDict

import msgspec

from shoal_common.store.bitmap import leaf_count
from shoal_common.store.leaf_set import leaf_range, least_sent_range, record_sent

MAX_BLOBS = 64
EXPIRY_S = 900.0
IN_FLIGHT_TIMEOUT_S = 10.0
"""In-flight leaves are not sent to anyone else for this long: a slower receiver is not waited for."""
RECENTLY_SENT_S = 1.0
"""Nor for this long after they were sent: until then others may not have heard who has them now, and ask for them."""


class InFlightLeaves(msgspec.Struct, eq=False):
    """Leaves [first, end) that are in flight, or were just sent."""

    blob: str
    first: int
    end: int
    until_s: float
    """Until then they are sent to nobody else."""
    sent: bool = False


class _SendCounts(msgspec.Struct):
    """One blob's leaves: the sets that were sent never, once, twice, …; and those in flight."""

    leaf_count: int
    sets: list[int]
    in_flight: list[InFlightLeaves]
    used_at_s: float


class SendHistory:
    """What was sent of each blob, or is in flight."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._blobs: OrderedDict[str, _SendCounts] = OrderedDict()

    def pick_next(
        self, blob: str, size_bytes: int, wanted: int, ready: int, max_leaves: int, now_s: float
    ) -> InFlightLeaves | None:
        """Return the next leaves to send, counted from now on; `ended` must follow. None if nothing can be sent."""
        counts = self._counts(blob, leaf_count(size_bytes), now_s)
        counts.in_flight = [g for g in counts.in_flight if not g.sent or now_s < g.until_s]
        for leaves in counts.in_flight:
            if now_s < leaves.until_s:
                ready &= ~leaf_range(leaves.first, leaves.end)
        chosen = least_sent_range(counts.sets, wanted, ready, max_leaves, self._draw)
        return None if chosen is None else _begun(counts, blob, *chosen, now_s)

    def record_requested(self, blob: str, first: int, end: int, now_s: float) -> InFlightLeaves | None:
        """Record that these leaves were requested; None for a blob of which no peer wants any leaf."""
        counts = self._blobs.get(blob)
        return None if counts is None else _begun(counts, blob, first, end, now_s)

    def record_finished(self, in_flight: InFlightLeaves, through: int, now_s: float) -> None:
        """Record that leaves up to `through` were sent; the rest were not, and are not counted."""
        counts = self._blobs.get(in_flight.blob)
        if counts is None or in_flight not in counts.in_flight:  # dropped meanwhile
            return
        through = max(through, in_flight.first)
        unsent = leaf_range(through, in_flight.end)
        in_flight.end, in_flight.sent, in_flight.until_s = min(through, in_flight.end), True, now_s + RECENTLY_SENT_S
        # From the second set on, leaves move down: what was counted once more is counted once less.
        for count in range(1, len(counts.sets)):
            moved = counts.sets[count] & unsent
            counts.sets[count] &= ~moved
            counts.sets[count - 1] |= moved

    def _counts(self, blob: str, leaves: int, now_s: float) -> _SendCounts:
        while self._blobs and next(iter(self._blobs.values())).used_at_s < now_s - EXPIRY_S:
            self._blobs.popitem(last=False)
        counts = self._blobs.get(blob)
        if counts is None or counts.leaf_count != leaves:
            counts = self._blobs[blob] = _SendCounts(leaves, [leaf_range(0, leaves)], [], now_s)
        counts.used_at_s = now_s
        self._blobs.move_to_end(blob)
        if len(self._blobs) > MAX_BLOBS:
            self._blobs.popitem(last=False)
        return counts


def _begun(counts: _SendCounts, blob: str, first: int, end: int, now_s: float) -> InFlightLeaves:
    record_sent(counts.sets, leaf_range(first, end))
    in_flight = InFlightLeaves(blob, first, end, now_s + IN_FLIGHT_TIMEOUT_S)
    counts.in_flight.append(in_flight)
    return in_flight
