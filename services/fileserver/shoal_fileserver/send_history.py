"""How often this node has sent each leaf, and which leaves are in flight; it chooses from that what to send next.

Kept in memory, for some blobs and a while: what is dropped costs at most a second copy before another leaf's first.
"""

from __future__ import annotations

import random
from collections import OrderedDict

import msgspec

from shoal_common.store.bitmap import leaf_count
from shoal_common.store.leaf_set import counted, least_sent, run

MAX_BLOBS = 64
FORGOTTEN_AFTER_S = 900.0
ON_ITS_WAY_S = 10.0
"""In-flight leaves are not sent to anyone else for this long: a slower receiver is not waited for."""
JUST_SENT_S = 1.0
"""Nor for this long after they were sent: until then others may not have heard who has them now, and ask for them."""


class Going(msgspec.Struct, eq=False):
    """Leaves [first, end) that are in flight, or were just sent."""

    blob: str
    first: int
    end: int
    until_s: float
    """Until then they are sent to nobody else."""
    gone: bool = False


class _Counts(msgspec.Struct):
    """One blob's leaves: the sets that were sent never, once, twice, …; and those in flight."""

    leaf_count: int
    sets: list[int]
    going: list[Going]
    used_at_s: float


class Sent:
    """What was sent of each blob, or is in flight."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._blobs: OrderedDict[str, _Counts] = OrderedDict()

    def choose(
        self, blob: str, size_bytes: int, wanted: int, ready: int, max_leaves: int, now_s: float
    ) -> Going | None:
        """Return the next leaves to send, counted from now on; `ended` must follow. None if nothing can be sent."""
        counts = self._counts(blob, leaf_count(size_bytes), now_s)
        counts.going = [g for g in counts.going if not g.gone or now_s < g.until_s]
        for leaves in counts.going:
            if now_s < leaves.until_s:
                ready &= ~run(leaves.first, leaves.end)
        chosen = least_sent(counts.sets, wanted, ready, max_leaves, self._draw)
        return None if chosen is None else _begun(counts, blob, *chosen, now_s)

    def asked(self, blob: str, first: int, end: int, now_s: float) -> Going | None:
        """Record that these leaves were requested; None for a blob of which no peer wants any leaf."""
        counts = self._blobs.get(blob)
        return None if counts is None else _begun(counts, blob, first, end, now_s)

    def ended(self, in_flight: Going, through: int, now_s: float) -> None:
        """Record that leaves up to `through` were sent; the rest were not, and are not counted."""
        counts = self._blobs.get(in_flight.blob)
        if counts is None or in_flight not in counts.going:  # dropped meanwhile
            return
        through = max(through, in_flight.first)
        unsent = run(through, in_flight.end)
        in_flight.end, in_flight.gone, in_flight.until_s = min(through, in_flight.end), True, now_s + JUST_SENT_S
        # From the second set on, leaves move down: what was counted once more is counted once less.
        for count in range(1, len(counts.sets)):
            moved = counts.sets[count] & unsent
            counts.sets[count] &= ~moved
            counts.sets[count - 1] |= moved

    def _counts(self, blob: str, leaves: int, now_s: float) -> _Counts:
        while self._blobs and next(iter(self._blobs.values())).used_at_s < now_s - FORGOTTEN_AFTER_S:
            self._blobs.popitem(last=False)
        counts = self._blobs.get(blob)
        if counts is None or counts.leaf_count != leaves:
            counts = self._blobs[blob] = _Counts(leaves, [run(0, leaves)], [], now_s)
        counts.used_at_s = now_s
        self._blobs.move_to_end(blob)
        if len(self._blobs) > MAX_BLOBS:
            self._blobs.popitem(last=False)
        return counts


def _begun(counts: _Counts, blob: str, first: int, end: int, now_s: float) -> Going:
    counted(counts.sets, run(first, end))
    in_flight = Going(blob, first, end, now_s + ON_ITS_WAY_S)
    counts.going.append(in_flight)
    return in_flight
