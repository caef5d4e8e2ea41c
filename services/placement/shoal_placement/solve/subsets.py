"""Every subset of up to 16 nodes at once: bit i of a number stands for node i.

Held and Karp, "A dynamic programming approach to sequencing problems" (1962): the shortest way over a set that ends
at v is the shortest over the set without v, and a link to v. O(2^n n^2), in numpy.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from shoal_placement.solve.cost import Floats, Ints

MOST = 16
"""Nodes for which all subsets are looked at."""


@lru_cache(maxsize=MOST + 1)
def sizes(count: int) -> Ints:
    """How many nodes each subset has."""
    found = np.zeros(1, dtype=np.int64)
    for _ in range(count):
        found = np.concatenate([found, found + 1])
    return found


@lru_cache(maxsize=MOST + 1)
def _of_size(count: int) -> list[Ints]:
    """By size: its subsets."""
    everything, size = np.arange(1 << count), sizes(count)
    return [everything[size == p] for p in range(count + 1)]


@lru_cache(maxsize=MOST + 1)
def _steps(count: int) -> list[list[tuple[Ints, Ints]]]:
    """For each size and each node: the subsets of that size that have it, and the same without it."""
    return [[(own := s[(s >> v) & 1 == 1], own ^ (1 << v)) for v in range(count)] for s in _of_size(count)]


@lru_cache(maxsize=MOST + 1)
def _rounds(count: int) -> list[tuple[Ints, Ints, list[tuple[Ints, Ints]]]]:
    """For each size from two on: the subsets, the lowest node of each, and for each node which of them have it not
    as the lowest one, with the places of the same without it among the subsets that are one smaller."""
    found = []
    place = np.zeros(1 << count, dtype=np.int64)
    for smaller, subsets in pairwise(_of_size(count)[1:]):
        place[smaller] = np.arange(len(smaller))
        step = []
        for v in range(count):
            own = np.flatnonzero(((subsets >> v) & 1 == 1) & (subsets & ((1 << v) - 1) != 0))
            step.append((own, place[subsets[own] ^ (1 << v)]))
        found.append((subsets, sizes(count)[(subsets & -subsets) - 1], step))
    return found


def round_trips(link_s: Floats) -> Floats:
    """For each subset the shortest way once through all its nodes and back, in seconds; 0 for one node.

    Kept for the links that were asked for last: each tier of a request, and each request, asks for the same ones.
    """
    return _round_trips(link_s.tobytes(), len(link_s))


@lru_cache(maxsize=8)
def _round_trips(links: bytes, count: int) -> Floats:
    link_s = np.frombuffer(links).reshape(count, count)
    found = np.zeros(1 << count)
    # By node and subset: the shortest way from the subset's lowest node through all of it to that node.
    ways = np.full((count, count), np.inf)
    np.fill_diagonal(ways, 0.0)
    for subsets, lowest, step in _rounds(count):
        longer = np.full((count, len(subsets)), np.inf)
        for node, (own, before) in enumerate(step):
            reached = ways.take(before, axis=1, mode="clip")
            reached += link_s[:, node, None]
            longer[node, own] = reached.min(axis=0)
        ways = longer
        ways_back = link_s.take(lowest, axis=1, mode="clip")
        ways_back += ways
        found[subsets] = ways_back.min(axis=0)
    found.flags.writeable = False
    return found


def ways_to(link_s: Floats, last: int) -> Floats:
    """For each node and each subset that has it, the shortest way from it through all of the subset on to `last`.

    Subsets are numbered without `last`: see `without`. From `last` itself it is no way at all.
    """
    count = len(link_s)
    others = [i for i in range(count) if i != last]
    between = link_s[others]
    ways = np.full((count, 1 << (count - 1)), np.inf)
    ways[last, 0] = 0.0
    for v, node in enumerate(others):
        ways[node, 1 << v] = link_s[node, last]
    for step in _steps(count - 1)[2:]:
        for v, (subset, before) in enumerate(step):
            longer = ways.take(before, axis=1, mode="clip")
            longer += between[v, :, None]
            ways[others[v], subset] = longer.min(axis=0)
    return ways


def without(subset: Ints, node: Ints) -> Ints:
    """The subsets' numbers where this node is not counted; they must not have it."""
    below = (1 << node) - 1
    return (subset & below) | ((subset >> (node + 1)) << node)


def earliest_start(reach: Ints) -> Ints:
    """For each subset the first layer from which on its nodes can hold all that follow, in some order.

    Exact for what memory allows: a node that holds layers up to one that comes later holds them from any later start
    too, so each takes as many as it can. With counts that are fixed it is a bound: no later start is needed.
    """
    count, layers = reach.shape[0], reach.shape[1] - 1
    far = np.maximum.accumulate(reach, axis=1)
    ends = np.arange(layers + 1)
    back = np.array([np.searchsorted(row, ends, side="left") for row in far])
    found = np.zeros(1 << count, dtype=np.int64)
    found[0] = layers
    for own, step in zip(_of_size(count)[1:], _steps(count)[1:], strict=True):
        found[own] = layers
        for v, (subset, before) in enumerate(step):
            found[subset] = np.minimum(found[subset], back[v][found[before]])
        if not found[own].any():
            break  # nor do larger ones need more
    return found
