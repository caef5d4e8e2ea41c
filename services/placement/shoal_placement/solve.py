"""The layout problem: which nodes, in which order, with how many layers each. Pure.

For an ordered set of nodes the split that minimises the fullest node's share of memory is found exactly: the best
fill of the first j layers by the first k nodes is

    f(k, j) = min over i of max(f(k-1, i), bytes(i, j) / room(k))

All i are tried that can still win. f(k-1, i) need not grow with i, because each node has to take a layer and layers
differ in size, so no bisection finds the minimum. All orders are tried for up to four nodes, because embedding and
head sit at the ends; for more, descending memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, permutations
from math import inf

import msgspec

_ALL_ORDERS_UP_TO = 4
_NONE = inf


class Need(msgspec.Struct, frozen=True):
    """What a model's parts take, in bytes, KV for the asked context included in its layer."""

    layer_bytes: list[int]
    embed_bytes: int = 0
    """On the first stage."""
    head_bytes: int = 0
    """On the last stage; when tied, the embedding's bytes are in here too."""
    tied: bool = False
    stage_bytes: int = 0
    """What every stage takes beside its layers."""


class Room(msgspec.Struct, frozen=True):
    """A node that may take layers, and the bytes it has for them."""

    node: str
    free_bytes: int
    holds: bool = False
    """Whether the model is on its disk already."""


class Slice(msgspec.Struct, frozen=True):
    """Layers [first, last) on a node, and the bytes they take there."""

    node: str
    first: int
    last: int
    bytes: int


class Layout(msgspec.Struct, frozen=True):
    """Stages in order. `fullest` is the largest share of a node's free memory that one of them takes: at most 1."""

    slices: list[Slice]
    fullest: float


def slice_bytes(need: Need, first: int, last: int) -> int:
    """Bytes of the stage with layers [first, last)."""
    return need.stage_bytes + sum(need.layer_bytes[first:last]) + _ends_bytes(need, first, last)


def _ends_bytes(need: Need, first: int, last: int) -> int:
    begins, ends = first == 0, last == len(need.layer_bytes)
    own = (need.embed_bytes if begins else 0) + (need.head_bytes if ends else 0)
    return own - (need.embed_bytes if need.tied and begins and ends else 0)


def best_split(need: Need, rooms: Sequence[Room]) -> Layout | None:
    """The split over these nodes in this order, each with a layer at least, that leaves the fullest one emptiest.

    None when no split fits.
    """
    count, nodes = len(need.layer_bytes), len(rooms)
    if not 1 <= nodes <= count or any(r.free_bytes <= 0 for r in rooms):
        return None
    prefix = [0, *accumulate(need.layer_bytes)]

    def share(k: int, first: int, last: int) -> float:
        own = need.stage_bytes + prefix[last] - prefix[first] + _ends_bytes(need, first, last)
        return own / rooms[k].free_bytes

    # best[j]: the fullest share when the nodes so far hold the first j layers; _NONE where they cannot.
    best = [_NONE, *(_fitting(share(0, 0, j)) for j in range(1, count + 1))]
    cuts: list[list[int]] = []
    for k in range(1, nodes):
        row, cut = [_NONE] * (count + 1), [0] * (count + 1)
        # Each node after this one needs a layer too, and the last one has to reach the end.
        for j in [count] if k == nodes - 1 else range(k + 1, count - (nodes - 1 - k) + 1):
            for i in range(j - 1, k - 1, -1):
                own = share(k, i, j)
                if own >= row[j] or own > 1:
                    break  # a longer stage only takes more
                if max(best[i], own) < row[j]:
                    row[j], cut[j] = max(best[i], own), i
        best, cuts = row, [*cuts, cut]
    if best[count] == _NONE:
        return None
    bounds = [count]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    slices = [
        Slice(room.node, first, last, slice_bytes(need, first, last))
        for room, (first, last) in zip(rooms, pairwise([0, *reversed(bounds)]), strict=True)
    ]
    return Layout(slices, best[count])


def _fitting(share: float) -> float:
    return share if share <= 1 else _NONE


def solve(need: Need, rooms: Sequence[Room], min_nodes: int, max_nodes: int) -> Layout | None:
    """The layout over the fewest nodes that fit, and of those as many as can be that hold the model. None: none fits.

    Of k nodes with h holders among them, the h largest holders and the k-h largest others fit whenever any such do:
    a larger node can take a smaller one's place. So one set for each h is all that has to be looked at.
    """
    by_size = sorted(rooms, key=lambda r: (-r.free_bytes, r.node))
    holders = [r for r in by_size if r.holds]
    others = [r for r in by_size if not r.holds]
    least_bytes = slice_bytes(need, 0, len(need.layer_bytes)) - need.stage_bytes
    for k in range(max(min_nodes, 1), min(max_nodes, len(rooms), len(need.layer_bytes)) + 1):
        for h in range(min(k, len(holders)), max(k - len(others), 0) - 1, -1):
            if sum(r.free_bytes for r in holders[:h] + others[: k - h]) < least_bytes + k * need.stage_bytes:
                continue
            chosen = sorted(holders[:h] + others[: k - h], key=by_size.index)
            found = [layout for order in _orders(chosen) if (layout := best_split(need, order)) is not None]
            if found:
                return min(found, key=lambda layout: layout.fullest)
    return None


def _orders(rooms: list[Room]) -> Iterator[Sequence[Room]]:
    if len(rooms) <= _ALL_ORDERS_UP_TO:
        yield from permutations(rooms)
    else:
        yield rooms
