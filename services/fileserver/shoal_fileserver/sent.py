"""How often this source has sent each leaf, to choose what it sends next: `least_sent` of `shoal_common/runs.py`.

Kept in memory, for some blobs and a while: forgetting costs nothing but a second copy before another's first.
"""

from __future__ import annotations

import random
from array import array
from collections import OrderedDict
from collections.abc import Iterable

import msgspec

from shoal_common.layout import leaf_count
from shoal_common.runs import least_sent

MAX_BLOBS = 64
FORGOTTEN_AFTER_S = 900.0
_MOST = (1 << 16) - 1


class _Counts(msgspec.Struct):
    """Of one blob: an unsigned short for each leaf."""

    by_leaf: array[int]
    used_at_s: float


class Sent:
    """What was sent of each blob."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._blobs: OrderedDict[str, _Counts] = OrderedDict()

    def choose(
        self, blob: str, size_bytes: int, wanted: int, ready: int, max_leaves: int, now_s: float
    ) -> tuple[int, int] | None:
        """The run [first, end) to send next, counted as sent from now on; None when nothing wanted is ready."""
        counts = self._counts(blob, leaf_count(size_bytes), now_s)
        chosen = least_sent(counts.by_leaf, wanted, ready, max_leaves, self._draw)
        if chosen is not None:
            for leaf in range(*chosen):
                counts.by_leaf[leaf] = min(counts.by_leaf[leaf] + 1, _MOST)
        return chosen

    def take_back(self, blob: str, leaves: Iterable[int]) -> None:
        """These leaves were chosen and have not been sent after all."""
        if counts := self._blobs.get(blob):
            for leaf in leaves:
                counts.by_leaf[leaf] = max(counts.by_leaf[leaf] - 1, 0)

    def _counts(self, blob: str, leaves: int, now_s: float) -> _Counts:
        while self._blobs and next(iter(self._blobs.values())).used_at_s < now_s - FORGOTTEN_AFTER_S:
            self._blobs.popitem(last=False)
        counts = self._blobs.get(blob)
        if counts is None or len(counts.by_leaf) != leaves:
            counts = self._blobs[blob] = _Counts(array("H", bytes(2 * leaves)), now_s)
        counts.used_at_s = now_s
        self._blobs.move_to_end(blob)
        if len(self._blobs) > MAX_BLOBS:
            self._blobs.popitem(last=False)
        return counts
