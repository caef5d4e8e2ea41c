"""Lower bounds of the cost of a set of nodes: work is assigned to the fastest nodes first, as if layers could be cut.

Each node of a set takes its smallest range of layers; then, fastest first, as much work as its memory and the
bottleneck allow for a range of layers. With equal layers nothing is cut and the bound is the cost itself: G of

    T(S) = G(S) + H(S),   H: the shortest round trip (subsets.py)

With unequal layers it is a lower bound, since each node's range is taken where it suits that node best. What the
first and the last stage have besides (embedding, head) is counted on those nodes, once they are known.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal_placement.solver.cost import CostModel, Floats, Ints
from shoal_placement.solver.fractional_knapsack import FractionalAssignment, SubsetSums
from shoal_placement.solver.subsets import (
    earliest_start,
    renumber_without,
    round_trips,
    shortest_paths_to,
    subset_sizes,
)


def can_each_hold_a_layer(bounds: Bounds) -> NDArray[np.bool_]:
    """Return for each subset whether each of its nodes could have a layer of its own, by memory.

    A larger node can hold what a smaller one can, so it is enough that there are at most c nodes on which no more
    than c of the layers fit, each by itself (Hall).
    """
    layers = np.sort(np.diff(bounds.chain.bytes))
    capacity = bounds.chain.free_bytes - bounds.chain.problem.stage_bytes
    can_hold = np.searchsorted(layers, capacity, side="right")
    size = subset_sizes(bounds.count)
    subsets = np.arange(1 << bounds.count)
    possible = np.ones(len(subsets), dtype=bool)
    for limit in np.unique(can_hold[can_hold < bounds.count]):
        among = int(sum(1 << int(i) for i in np.flatnonzero(can_hold <= limit)))
        possible &= size[subsets & among] <= limit
    return possible


def interchangeable_nodes(bounds: Bounds) -> list[int]:
    """Return for each node the nearest one before it that it is interchangeable with; -1 if there is none."""
    chain, link_s, count = bounds.chain, bounds.link_s, bounds.count
    alike = [-1] * count
    for b in range(count):
        for a in range(b - 1, -1, -1):
            others = [i for i in range(count) if i not in (a, b)]
            if (
                chain.free_bytes[a] == chain.free_bytes[b]
                and chain.required_counts[a] == chain.required_counts[b]
                and chain.s_per_work[a] == chain.s_per_work[b]
                and link_s[a, b] == link_s[b, a]
                and np.array_equal(chain.cost[a], chain.cost[b])
                and np.array_equal(chain.fetch[a], chain.fetch[b])
                and np.array_equal(link_s[a, others], link_s[b, others])
                and np.array_equal(link_s[others, a], link_s[others, b])
            ):
                alike[b] = a
                break
    return alike


IMPOSSIBLE_WORK = 1e30
"""The work of a range that no memory holds."""
ROLE_INNER, ROLE_FIRST, ROLE_LAST = 0, 1, 2
MAX_BATCH_ROWS = 1 << 12
"""Rows that are bounded in one call: it limits memory, and how long numpy blocks other threads."""


class BoundContext:
    """What each node can take within a bottleneck: one row for each bottleneck; a set's size chooses the row."""

    def __init__(self, chain: CostModel, max_s: Floats) -> None:
        self.reach: Ints = chain.reach(max_s)
        """By row, node and first layer."""
        self.max_work: Floats = np.array(_most_work(chain, self.reach)).swapaxes(1, 2)
        """By role, node and row: the work of the largest range of layers."""


def _most_work(chain: CostModel, reach: Ints) -> list[Floats]:
    """Return by role, for each row and node, the work of the largest range of layers."""
    work, last = chain.work, chain.layer_count
    starts = np.arange(1, last)
    begins = work[1:last]
    longest, least = reach[..., 1:last], np.maximum(chain.required_counts, 1)[:, None]
    inner = np.minimum(longest, last - 1)
    inner_work = np.where(inner - starts >= least, work[inner] - begins, 0.0)
    ends = np.where((longest >= last) & (last - starts >= least), work[last] - begins, 0.0)
    to = reach[..., 0]
    first = np.where(to >= least[:, 0], work[np.minimum(to, last - 1)], 0.0)
    return [inner_work.max(axis=-1, initial=0.0), first, ends.max(axis=-1, initial=0.0)]


def _least_work(chain: CostModel, reach: Ints) -> list[Floats]:
    """Return by role, for each node, the work of the smallest range of layers."""
    work, last = chain.work, chain.layer_count
    every = np.arange(last + 1)
    shortest = every + np.maximum(chain.required_counts, 1)[:, None]
    shortest = np.where(reach >= shortest, shortest, every)  # the first layer itself if there is no range
    starts = every[1:last]
    inner = shortest[:, 1:last]
    inner_work = np.where((inner > starts) & (inner < last), work[inner] - work[starts], IMPOSSIBLE_WORK)
    first = np.where((shortest[:, 0] > 0) & (shortest[:, 0] < last), work[shortest[:, 0]], IMPOSSIBLE_WORK)
    begins = last - np.maximum(chain.required_counts, 1)
    holds = (begins > 0) & (reach[np.arange(len(reach)), np.maximum(begins, 0)] >= last)
    ends = np.where(holds, work[last] - work[np.maximum(begins, 0)], IMPOSSIBLE_WORK)
    return [inner_work.min(axis=1, initial=IMPOSSIBLE_WORK), first, ends]


class Bounds:
    """The bounds for one chain of layers over at most `subsets.MOST` nodes."""

    def __init__(self, chain: CostModel, link_s: Floats) -> None:
        self.chain, self.link_s = chain, link_s
        self.count, self.layers = len(chain.nodes), chain.layer_count
        self.node_indices: Ints = np.arange(self.count)
        by_layer = np.diff(chain.cost, axis=1) / np.diff(chain.work)
        inside = by_layer[:, 1:-1] if self.layers > 2 else by_layer
        self.cost_per_work: Floats = inside.min(axis=1)
        """By node, the least cost of a unit of work."""
        work = np.diff(chain.work)
        self.extra_first: Floats = (by_layer[:, 0] - self.cost_per_work) * work[0]
        self.extra_last: Floats = (by_layer[:, -1] - self.cost_per_work) * work[-1]
        """What the two ends cost besides; may be below 0."""
        reach = chain.reach(float("inf"))
        self.min_work: Floats = np.array(_least_work(chain, reach))
        self.round_trips_s: Floats = round_trips(link_s)
        self._paths: list[Floats | None] = [None] * self.count
        self.earliest_start: Ints = earliest_start(reach)
        g, h = chain.problem.embed_work, chain.problem.head_work
        self._ends_beside = self._least_in_each(self.cost_per_work * g + self.extra_first) + self._least_in_each(
            self.cost_per_work * h + self.extra_last
        )
        self._ends_work = np.array([0.0, g, h])
        self.assignment = FractionalAssignment(self.cost_per_work, float(chain.work[-1]))

    def _least_in_each(self, values: Floats) -> Floats:
        least = np.full(1, np.inf)
        for value in values:
            least = np.concatenate([least, np.minimum(least, value)])
        return least

    def links_to(self, node: Ints, through: Ints, last: Ints, exactly: bool) -> Floats:
        """Return a lower bound of the links from each node through all of a set to its last node, in seconds.

        `exactly` takes O(2^n n^2) once for each last node. Otherwise the path and a link from the last node back
        count as a round trip, which is no shorter than the shortest one.
        """
        if not exactly:
            closed: Floats = self.round_trips_s[through | (1 << node)] - self.link_s[last, node]
            return closed
        bound_s = np.empty(len(node))
        subset = renumber_without((through | (1 << node)) & ~(1 << last), last)
        for end in np.unique(last):
            if self._paths[end] is None:
                self._paths[end] = shortest_paths_to(self.link_s, int(end))
            to_end = np.flatnonzero(last == end)
            paths_s = self._paths[end]
            assert paths_s is not None
            bound_s[to_end] = paths_s[node[to_end], subset[to_end]]
        return bound_s

    def bottleneck_bounds_s(self) -> Floats:
        """Return for each subset a lower bound of the slowest stage's seconds: that of equally long stages."""
        with np.errstate(divide="ignore"):
            speed = 1 / self.chain.s_per_work
        total_speed = np.zeros(1)
        for node_speed in speed:
            total_speed = np.concatenate([total_speed, total_speed + node_speed])
        total_speed[0] = 1.0
        return float(self.chain.work[-1]) / total_speed

    def bounds_of_all_sets(self, context: BoundContext) -> Floats:
        """Return a lower bound of T for each subset, by the first row of the limits."""
        tables, work = self._of_sets(context)
        return self.assignment.costs_of_all_sets(tables, work) + self._ends_beside + self.round_trips_s

    def bounds_of_sets(self, sets: Ints, rows: Ints, context: BoundContext) -> Floats:
        """Return a lower bound of T for these sets, whichever nodes are first and last."""
        tables, work = self._of_sets(context)
        besides = self._ends_beside[sets] + self.round_trips_s[sets]
        costs = [
            self.assignment.costs(tables.sums_of(sets[c], rows[c]), np.full(len(sets[c]), work))
            for c in chunks(len(sets))
        ]
        return np.concatenate([*costs, np.zeros(0)]) + besides

    def _of_sets(self, context: BoundContext) -> tuple[SubsetSums, float]:
        beside = self._ends_work[:, None]
        least = (self.min_work - beside).min(axis=0)
        most = (context.max_work - beside[:, :, None]).max(axis=0)
        return SubsetSums(self.assignment.terms(least, most)), float(self.chain.work[-1] - self._ends_work.sum())

    def remainder_bounds(self, context: BoundContext) -> RemainderBounds:
        """Return the bounds of what is left, within these limits."""
        return RemainderBounds(self, context)


class RemainderBounds:
    """Lower bounds of T without links, for the layers from a given one on over exactly the nodes of a set."""

    def __init__(self, bounds: Bounds, context: BoundContext) -> None:
        self._bounds, self._assignment = bounds, bounds.assignment
        inner, first, last = (
            bounds.assignment.terms(own, most) for own, most in zip(bounds.min_work, context.max_work, strict=True)
        )
        self._tables = SubsetSums(inner)
        self._first, self._last = first, last

    def sums(self, rest: Ints, last: Ints, first: Ints | None, rows: Ints) -> Floats:
        """Return the sums for `costs`. `last` is the last node of `rest`, if that is not empty; `first`, if given,
        has layer 0."""
        ends = 1 << last
        if first is not None:
            ends |= 1 << first
        sums = self._tables.sums_of(rest & ~ends, rows)
        nonempty = rest > 0
        of_last = self._last[:, last, rows]
        sums += of_last if nonempty.all() else np.where(nonempty, of_last, 0.0)
        if first is not None:
            sums += self._first[:, first, rows]
        return sums

    def end_costs(self, rest: Ints, last: Ints, first: Ints | None) -> Floats:
        """Return what the ends cost besides."""
        besides: Floats = np.where(rest > 0, self._bounds.extra_last[last], 0.0)
        return besides if first is None else besides + self._bounds.extra_first[first]

    def costs(self, sums: Floats, from_layer: Ints) -> Floats:
        """Return the cost of the layers from `from_layer` on, without `beside`. Overwrites `sums`."""
        return self._assignment.costs(sums, self._bounds.chain.work[-1] - self._bounds.chain.work[from_layer])


def chunks(count: int) -> list[slice]:
    """Return `count` rows as slices of `MAX_BATCH_ROWS`."""
    return [slice(start, start + MAX_BATCH_ROWS) for start in range(0, count, MAX_BATCH_ROWS)]
