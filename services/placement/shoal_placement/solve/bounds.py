"""What a set of nodes costs at least: work is poured into the fastest nodes first, as if layers could be cut.

Each node of a set takes its smallest run of layers, then, fastest first, as much work as its memory and the asked
bottleneck let a run of layers have. With equal layers nothing is cut and the bound is the cost itself: G of

    T(S) = G(S) + H(S),   H: the shortest round trip (subsets.py)

With unequal ones it is a bound, for runs of layers are taken at the best place for each node by itself. What the
first and the last stage take beside (embedding, head) is counted where they are, once it is known where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal_placement.solve.cost import Chain, Floats, Ints
from shoal_placement.solve.subsets import earliest_start, round_trips, ways_to, without

NEVER = 1e30
"""The work of a run that no memory holds."""
INNER, FIRST, LAST = 0, 1, 2
CLOSE = 1e-9
"""Costs that differ by less than this share are the same."""


class Limits:
    """What each node can take within a bottleneck: one row for each, which a set's size chooses."""

    def __init__(self, chain: Chain, most_s: Sequence[float]) -> None:
        known = {s: chain.reach(s) for s in set(most_s)}
        self.reach: Ints = np.array([known[s] for s in most_s])
        most = {s: np.array(_most_work(chain, reach)) for s, reach in known.items()}
        self.most: Floats = np.stack([most[s] for s in most_s], axis=2)
        """By role, node and row: the work of the largest run of layers."""


def _runs(chain: Chain, reach: Ints) -> tuple[Ints, Ints]:
    """By node and first layer: the ends of the shortest and the longest run there; the same where there is none."""
    starts = np.arange(chain.layers + 1)
    shortest = starts + np.maximum(chain.fixed, 1)[:, None]
    return np.where(reach >= shortest, shortest, starts), reach


def _most_work(chain: Chain, reach: Ints) -> list[Floats]:
    work, last = chain.work, chain.layers
    shortest, longest = _runs(chain, reach)
    inner = np.minimum(longest, last - 1)[:, 1:last]
    fits = (inner >= shortest[:, 1:last]) & (shortest[:, 1:last] > np.arange(1, last))
    inner_work = np.where(fits, work[inner] - work[np.arange(1, last)], 0.0)
    ends = np.where(longest[:, 1:last] >= last, work[last] - work[np.arange(1, last)], 0.0)
    first = np.where(shortest[:, 0] > 0, work[np.minimum(longest[:, 0], last - 1)], 0.0)
    return [inner_work.max(axis=1, initial=0.0), first, ends.max(axis=1, initial=0.0)]


def _least_work(chain: Chain, reach: Ints) -> list[Floats]:
    work, last = chain.work, chain.layers
    shortest, _ = _runs(chain, reach)
    starts = np.arange(1, last)
    inner = shortest[:, 1:last]
    inner_work = np.where((inner > starts) & (inner < last), work[inner] - work[starts], NEVER)
    first = np.where((shortest[:, 0] > 0) & (shortest[:, 0] < last), work[shortest[:, 0]], NEVER)
    begins = last - np.maximum(chain.fixed, 1)
    holds = (begins > 0) & (reach[np.arange(len(reach)), np.maximum(begins, 0)] >= last)
    ends = np.where(holds, work[last] - work[np.maximum(begins, 0)], NEVER)
    return [inner_work.min(axis=1, initial=NEVER), first, ends]


class Bounds:
    """The bounds for one chain of layers over at most `subsets.MOST` nodes."""

    def __init__(self, chain: Chain, link_s: Floats) -> None:
        self.chain, self.link_s = chain, link_s
        self.count, self.layers = len(chain.nodes), chain.layers
        self.places: Ints = np.arange(self.count)
        by_layer = np.diff(chain.cost, axis=1) / np.diff(chain.work)
        inside = by_layer[:, 1:-1] if self.layers > 2 else by_layer
        self.rate: Floats = inside.min(axis=1)
        """Of each node, the least it costs to give it a unit of work."""
        work = np.diff(chain.work)
        self.beside_first: Floats = (by_layer[:, 0] - self.rate) * work[0]
        self.beside_last: Floats = (by_layer[:, -1] - self.rate) * work[-1]
        """What the two ends cost beside that; may be below 0."""
        self._fastest_first: Ints = np.argsort(self.rate, kind="stable")
        reach = chain.reach(float("inf"))
        self.least: Floats = np.array(_least_work(chain, reach))
        self.trips: Floats = round_trips(link_s)
        self._ways: list[Floats | None] = [None] * self.count
        self.start: Ints = earliest_start(reach)
        g, h = chain.problem.embed_work, chain.problem.head_work
        self._ends_beside = self._least_in_each(self.rate * g + self.beside_first) + self._least_in_each(
            self.rate * h + self.beside_last
        )
        self._ends_work = np.array([0.0, g, h])

    def _least_in_each(self, values: Floats) -> Floats:
        found = np.full(1, np.inf)
        for value in values:
            found = np.concatenate([found, np.minimum(found, value)])
        return found

    def links_to(self, node: Ints, through: Ints, last: Ints, exactly: bool) -> Floats:
        """Seconds at least of the links from each node through all of a set to the last one, which is in the set.

        `exactly` takes O(2^n n^2) for each last node once. Otherwise the way to the last node and a link from there
        back is taken for a round trip, which is no shorter than the shortest.
        """
        if not exactly:
            closed: Floats = self.trips[through | (1 << node)] - self.link_s[last, node]
            return closed
        found = np.empty(len(node))
        subset = without((through | (1 << node)) & ~(1 << last), last)
        for end in np.unique(last):
            if self._ways[end] is None:
                self._ways[end] = ways_to(self.link_s, int(end))
            own = np.flatnonzero(last == end)
            ways = self._ways[end]
            assert ways is not None
            found[own] = ways[node[own], subset[own]]
        return found

    def of_sets(self, sets: Ints, limits: Limits, row: int) -> Floats:
        """T at least, whichever nodes are first and last."""
        beside = self._ends_work[:, None]
        least = (self.least - beside).min(axis=0)
        most = (limits.most[:, :, row] - beside).max(axis=0)
        inside = ((sets >> self.places[:, None]) & 1).astype(float)
        spare = np.maximum(most - least, 0.0)[:, None] * inside
        work = self.chain.work[-1] - self._ends_work.sum()
        own = least[:, None] * inside
        return self._pour(own, spare, np.full(len(sets), work)) + self._ends_beside[sets] + self.trips[sets]

    def of_rest(
        self, rest: Ints, from_layer: Ints, last: Ints, first: Ints | None, limits: Limits, rows: Ints
    ) -> Floats:
        """T without links, at least, of the layers from `from_layer` on over exactly the nodes of `rest`.

        `last` is the last of them; `first`, when given, has layer 0.
        """
        inside = ((rest >> self.places[:, None]) & 1).astype(float)
        own = self.least[INNER][:, None] * inside
        most = limits.most[INNER].take(rows, axis=1)
        each = np.arange(len(rest))
        # Where nothing is left there is no last one.
        here = rest > 0
        own[last, each] = np.where(here, self.least[LAST][last], 0.0)
        most[last, each] = limits.most[LAST][last, rows]
        beside = np.where(here, self.beside_last[last], 0.0)
        if first is not None:
            own[first, each] = self.least[FIRST][first]
            most[first, each] = limits.most[FIRST][first, rows]
            beside = beside + self.beside_first[first]
        spare = np.maximum(most * inside - own, 0.0)
        return self._pour(own, spare, self.chain.work[-1] - self.chain.work[from_layer]) + beside

    def _pour(self, own: Floats, spare: Floats, work: Floats) -> Floats:
        cost = self.rate @ own
        left = work - own.sum(axis=0)
        tolerance = CLOSE * self.chain.work[-1]
        never = left < -tolerance
        left = np.maximum(left, 0.0)
        for node in self._fastest_first:
            taken = np.minimum(left, spare[node])
            left -= taken
            taken *= self.rate[node]
            cost += taken
        cost[never | (left > tolerance)] = np.inf
        return cost
