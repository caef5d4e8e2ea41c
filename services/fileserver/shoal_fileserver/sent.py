"""How often this source has sent each leaf, to choose what it sends next.

`least_sent` of `shoal_common/runs.py` says what is chosen; here the leaves are kept in sets, one for each count, so
that a blob of 100,000 leaves takes microseconds too. In memory, for some blobs and a while: what is forgotten costs
nothing but a second copy before another's first.
"""

from __future__ import annotations

import random
from collections import OrderedDict

import msgspec

from shoal_common.layout import leaf_count
from shoal_common.runs import drawn, run, run_around

MAX_BLOBS = 64
FORGOTTEN_AFTER_S = 900.0
MAX_COUNT = 64
"""Leaves that were sent more often count as sent so often."""


class _Counts(msgspec.Struct):
    """Of one blob: the leaves that were sent never, once, twice, …"""

    leaf_count: int
    sets: list[int]
    used_at_s: float


class Sent:
    """What was sent of each blob, or is being sent."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._blobs: OrderedDict[str, _Counts] = OrderedDict()

    def choose(
        self, blob: str, size_bytes: int, wanted: int, ready: int, max_leaves: int, now_s: float
    ) -> tuple[int, int] | None:
        """The run [first, end) to send next, counted as sent from now on; None when nothing wanted is ready."""
        counts = self._counts(blob, leaf_count(size_bytes), now_s)
        least = next((least for leaves in counts.sets if (least := leaves & wanted & ready)), 0)
        if not least:
            return None
        chosen = run_around(drawn(least, self._draw), least, max_leaves)
        _move(counts.sets, run(*chosen), 1)
        return chosen

    def take_back(self, blob: str, first: int, end: int) -> None:
        """These leaves were chosen, and have not been sent after all."""
        if counts := self._blobs.get(blob):
            _move(counts.sets, run(first, end), -1)

    def _counts(self, blob: str, leaves: int, now_s: float) -> _Counts:
        while self._blobs and next(iter(self._blobs.values())).used_at_s < now_s - FORGOTTEN_AFTER_S:
            self._blobs.popitem(last=False)
        counts = self._blobs.get(blob)
        if counts is None or counts.leaf_count != leaves:
            counts = self._blobs[blob] = _Counts(leaves, [run(0, leaves)], now_s)
        counts.used_at_s = now_s
        self._blobs.move_to_end(blob)
        if len(self._blobs) > MAX_BLOBS:
            self._blobs.popitem(last=False)
        return counts


def _move(sets: list[int], leaves: int, by: int) -> None:
    """Count these leaves once more, or once less."""
    moved = [kept & leaves for kept in sets]
    for count, those in enumerate(moved):
        to = min(max(count + by, 0), MAX_COUNT)
        if those and to != count:
            if to == len(sets):
                sets.append(0)
            sets[count] &= ~those
            sets[to] |= those
