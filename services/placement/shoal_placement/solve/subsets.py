"""Every subset of up to 16 nodes at once: bit i of a number stands for node i.

Held and Karp, "A dynamic programming approach to sequencing problems" (1962): the shortest way over a set that ends
at v is the shortest over the set without v, and a link to v. O(2^n n^2), in numpy.
"""

from __future__ import annotations

from functools import lru_cache

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
def _steps(count: int) -> list[list[tuple[Ints, Ints]]]:
    """For each size and each node: the subsets of that size that have it, and the same without it."""
    everything, size = np.arange(1 << count), sizes(count)
    of_size = [everything[size == p] for p in range(count + 1)]
    return [[(own := s[(s >> v) & 1 == 1], own ^ (1 << v)) for v in range(count)] for s in of_size]


def round_trips(link_s: Floats) -> Floats:
    """For each subset the shortest way once through all its nodes and back, in seconds; 0 for one node."""
    count = len(link_s)
    found = np.zeros(1 << count)
    for start in range(count - 1):
        # Each way is counted from its lowest node, so those below are left out.
        above = count - 1 - start
        ways = np.full((above, 1 << above), np.inf)
        for v in range(above):
            ways[v, 1 << v] = link_s[start, start + 1 + v]
        between = link_s[start + 1 :, start + 1 :]
        for step in _steps(above)[2:]:
            for v, (subset, before) in enumerate(step):
                longer = ways.take(before, axis=1, mode="clip")
                longer += between[:, v, None]
                ways[v, subset] = longer.min(axis=0)
        ways += link_s[start + 1 :, start, None]
        closed = ways.min(axis=0)
        closed[0] = 0.0
        found[(1 << start) + (np.arange(1 << above) << (start + 1))] = closed
    return found


def ways_to(link_s: Floats, last: int) -> Floats:
    """For each node and each subset that has it, the shortest way from it through all of the subset on to `last`.

    Subsets are numbered without `last`: see `without`.
    """
    count = len(link_s)
    others = [i for i in range(count) if i != last]
    between = link_s[others]
    ways = np.full((count, 1 << (count - 1)), np.inf)
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
    found = np.full(1 << count, layers)
    for step in _steps(count)[1:]:
        for v, (subset, before) in enumerate(step):
            found[subset] = np.minimum(found[subset], back[v][found[before]])
    return found
