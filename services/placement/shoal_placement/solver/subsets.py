"""Every subset of up to 16 nodes at once: bit i of a number stands for node i.

Held and Karp, "A dynamic programming approach to sequencing problems" (1962): the shortest path through a set that
ends at v is the shortest one through the set without v, plus a link to v. O(2^n n^2), in numpy.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from shoal_placement.solver.cost import Floats, Ints

MAX_NODES = 16
"""Nodes of which all subsets are enumerated."""


@lru_cache(maxsize=MAX_NODES + 1)
def subset_sizes(count: int) -> Ints:
    """Return the number of nodes of each subset."""
    by_subset = np.zeros(1, dtype=np.int64)
    for _ in range(count):
        by_subset = np.concatenate([by_subset, by_subset + 1])
    return by_subset


@lru_cache(maxsize=MAX_NODES + 1)
def _of_size(count: int) -> list[Ints]:
    """Return the subsets by size."""
    everything, size = np.arange(1 << count), subset_sizes(count)
    return [everything[size == p] for p in range(count + 1)]


@lru_cache(maxsize=MAX_NODES + 1)
def _steps(count: int) -> list[list[tuple[Ints, Ints]]]:
    """Return for each size and node the subsets of that size with the node, and the same subsets without it."""
    return [
        [(with_node := s[(s >> v) & 1 == 1], with_node ^ (1 << v)) for v in range(count)] for s in _of_size(count)
    ]


@lru_cache(maxsize=MAX_NODES + 1)
def _rounds(count: int) -> list[tuple[Ints, Ints, list[tuple[Ints, Ints]]]]:
    """Return for each size from two on the subsets, the lowest node of each, and for each node two lists of rows:
    of the subsets that have it but not as their lowest node, and of the same without it among the smaller ones."""
    rounds = []
    row = np.zeros(1 << count, dtype=np.int64)
    for smaller, subsets in pairwise(_of_size(count)[1:]):
        row[smaller] = np.arange(len(smaller))
        step = []
        for v in range(count):
            with_node = np.flatnonzero(((subsets >> v) & 1 == 1) & (subsets & ((1 << v) - 1) != 0))
            step.append((with_node, row[subsets[with_node] ^ (1 << v)]))
        rounds.append((subsets, subset_sizes(count)[(subsets & -subsets) - 1], step))
    return rounds


def round_trips(link_s: Floats) -> Floats:
    """Return for each subset the shortest round trip through all its nodes, in seconds; 0 for one node.

    Cached for the latest links: each tier of a request, and each request, needs the same ones.
    """
    return _round_trips(link_s.tobytes(), len(link_s))


@lru_cache(maxsize=8)
def _round_trips(links: bytes, count: int) -> Floats:
    link_s = np.frombuffer(links).reshape(count, count)
    trips_s = np.zeros(1 << count)
    # By node and subset: the shortest path from the subset's lowest node through all of it to that node.
    paths_s = np.full((count, count), np.inf)
    np.fill_diagonal(paths_s, 0.0)
    for subsets, lowest, step in _rounds(count):
        longer_s = np.full((count, len(subsets)), np.inf)
        for node, (with_node, before) in enumerate(step):
            extended_s = paths_s.take(before, axis=1, mode="clip")
            extended_s += link_s[:, node, None]
            longer_s[node, with_node] = extended_s.min(axis=0)
        paths_s = longer_s
        closed_s = link_s.take(lowest, axis=1, mode="clip")
        closed_s += paths_s
        trips_s[subsets] = closed_s.min(axis=0)
    trips_s.flags.writeable = False
    return trips_s


def shortest_paths_to(link_s: Floats, last: int) -> Floats:
    """Return for each node and each subset with it the shortest path from it through all of the subset to `last`.

    Subsets are numbered without `last`: see `without`. The path from `last` itself is 0.
    """
    count = len(link_s)
    others = [i for i in range(count) if i != last]
    between = link_s[others]
    paths_s = np.full((count, 1 << (count - 1)), np.inf)
    paths_s[last, 0] = 0.0
    for v, node in enumerate(others):
        paths_s[node, 1 << v] = link_s[node, last]
    for step in _steps(count - 1)[2:]:
        for v, (subset, before) in enumerate(step):
            longer_s = paths_s.take(before, axis=1, mode="clip")
            longer_s += between[v, :, None]
            paths_s[others[v], subset] = longer_s.min(axis=0)
    return paths_s


def renumber_without(subset: Ints, node: Ints) -> Ints:
    """Return the subsets renumbered without this node, which they must not have."""
    below = (1 << node) - 1
    return (subset & below) | ((subset >> (node + 1)) << node)


def earliest_start(reach: Ints) -> Ints:
    """Return for each subset the first layer from which on its nodes can hold all that follow, in some order.

    Exact for memory: a node that holds the layers up to some end holds them from any later start too, so each node
    takes as many as it can. With required counts it is a bound: no later start is needed.
    """
    count, layers = reach.shape[0], reach.shape[1] - 1
    max_end = np.maximum.accumulate(reach, axis=1)
    ends = np.arange(layers + 1)
    first_for_end = np.array([np.searchsorted(row, ends, side="left") for row in max_end])
    start = np.zeros(1 << count, dtype=np.int64)
    start[0] = layers
    for subsets, step in zip(_of_size(count)[1:], _steps(count)[1:], strict=True):
        start[subsets] = layers
        for v, (with_node, before) in enumerate(step):
            start[with_node] = np.minimum(start[with_node], first_for_end[v][start[before]])
        if not start[subsets].any():
            break  # all are 0, and so are those of larger subsets
    return start
