"""How often this source has sent each leaf, and what is on its way: from this it chooses what it sends next.

Kept in memory, for some blobs and a while: what is forgotten costs nothing but a second copy before another's first.
"""

from __future__ import annotations

import random
from collections import OrderedDict

import msgspec

from shoal_common.layout import leaf_count
from shoal_common.runs import counted, least_sent, run

MAX_BLOBS = 64
FORGOTTEN_AFTER_S = 900.0
ON_ITS_WAY_S = 10.0
"""So long a leaf that is on its way to somebody is sent to nobody else: who takes longer is nobody to wait for."""
JUST_SENT_S = 1.0
"""And so long after it has gone: until then others may not have heard that somebody has it now, and ask for it."""


class Going(msgspec.Struct, eq=False):
    """Leaves [first, end) on their way to somebody, or just gone."""

    blob: str
    first: int
    end: int
    until_s: float
    """Until then they are sent to nobody else."""
    gone: bool = False


class _Counts(msgspec.Struct):
    """Of one blob: the leaves that were sent never, once, twice, …; and those on their way."""

    leaf_count: int
    sets: list[int]
    going: list[Going]
    used_at_s: float


class Sent:
    """What was sent of each blob, or is being sent."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._blobs: OrderedDict[str, _Counts] = OrderedDict()

    def choose(
        self, blob: str, size_bytes: int, wanted: int, ready: int, max_leaves: int, now_s: float
    ) -> Going | None:
        """The run to send next, counted from now on; `ended` has to follow. None when nothing wanted can be sent."""
        counts = self._counts(blob, leaf_count(size_bytes), now_s)
        counts.going = [g for g in counts.going if not g.gone or now_s < g.until_s]
        for going in counts.going:
            if now_s < going.until_s:
                ready &= ~run(going.first, going.end)
        chosen = least_sent(counts.sets, wanted, ready, max_leaves, self._draw)
        return None if chosen is None else _begun(counts, blob, *chosen, now_s)

    def asked(self, blob: str, first: int, end: int, now_s: float) -> Going | None:
        """Somebody asked for these very leaves, which counts as well; None for a blob of which nobody wants any."""
        counts = self._blobs.get(blob)
        return None if counts is None else _begun(counts, blob, first, end, now_s)

    def ended(self, going: Going, through: int, now_s: float) -> None:
        """Leaves up to `through` have gone; the rest has not, and counts no more."""
        counts = self._blobs.get(going.blob)
        if counts is None or going not in counts.going:  # forgotten meanwhile
            return
        through = max(through, going.first)
        lost = run(through, going.end)
        going.end, going.gone, going.until_s = min(through, going.end), True, now_s + JUST_SENT_S
        # Sets move down from the second on: what was counted once more is counted once less.
        for count in range(1, len(counts.sets)):
            less = counts.sets[count] & lost
            counts.sets[count] &= ~less
            counts.sets[count - 1] |= less

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
    going = Going(blob, first, end, now_s + ON_ITS_WAY_S)
    counts.going.append(going)
    return going
