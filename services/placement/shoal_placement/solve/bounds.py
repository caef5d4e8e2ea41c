"""What a set of nodes costs at least: work is poured into the fastest nodes first, as if layers could be cut.

Each node of a set takes its smallest run of layers, then, fastest first, as much work as its memory and the asked
bottleneck let a run of layers have. With equal layers nothing is cut and the bound is the cost itself: G of

    T(S) = G(S) + H(S),   H: the shortest round trip (subsets.py)

With unequal ones it is a bound, for runs of layers are taken at the best place for each node by itself. What the
first and the last stage take beside (embedding, head) is counted where they are, once it is known where they are.
"""

from __future__ import annotations

import numpy as np

from shoal_placement.solve.cost import Chain, Floats, Ints
from shoal_placement.solve.pour import Pour, Tables
from shoal_placement.solve.subsets import earliest_start, round_trips, ways_to, without

NEVER = 1e30
"""The work of a run that no memory holds."""
INNER, FIRST, LAST = 0, 1, 2
ROWS_AT_ONCE = 1 << 12
"""So many are bounded in one go: it bounds memory, and how long numpy keeps other threads waiting."""


class Limits:
    """What each node can take within a bottleneck: one row for each, which a set's size chooses."""

    def __init__(self, chain: Chain, most_s: Floats) -> None:
        self.reach: Ints = chain.reach(most_s)
        """By row, node and first layer."""
        self.most: Floats = np.array(_most_work(chain, self.reach)).swapaxes(1, 2)
        """By role, node and row: the work of the largest run of layers."""


def _most_work(chain: Chain, reach: Ints) -> list[Floats]:
    """By role: of each row and node, the work of the largest run of layers."""
    work, last = chain.work, chain.layers
    starts = np.arange(1, last)
    begins = work[1:last]
    longest, least = reach[..., 1:last], np.maximum(chain.fixed, 1)[:, None]
    inner = np.minimum(longest, last - 1)
    inner_work = np.where(inner - starts >= least, work[inner] - begins, 0.0)
    ends = np.where((longest >= last) & (last - starts >= least), work[last] - begins, 0.0)
    to = reach[..., 0]
    first = np.where(to >= least[:, 0], work[np.minimum(to, last - 1)], 0.0)
    return [inner_work.max(axis=-1, initial=0.0), first, ends.max(axis=-1, initial=0.0)]


def _least_work(chain: Chain, reach: Ints) -> list[Floats]:
    """By role: of each node, the work of the smallest run of layers."""
    work, last = chain.work, chain.layers
    every = np.arange(last + 1)
    shortest = every + np.maximum(chain.fixed, 1)[:, None]
    shortest = np.where(reach >= shortest, shortest, every)  # the first layer itself where there is none
    starts = every[1:last]
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
        self.pour = Pour(self.rate, float(chain.work[-1]))

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

    def shares(self) -> Floats:
        """For each subset seconds of the slowest stage at least, if all its stages took the same."""
        with np.errstate(divide="ignore"):
            speed = 1 / self.chain.s_per_work
        found = np.zeros(1)
        for node in speed:
            found = np.concatenate([found, found + node])
        found[0] = 1.0
        return float(self.chain.work[-1]) / found

    def of_every_set(self, limits: Limits) -> Floats:
        """T at least of each subset, by the first row of the limits."""
        tables, work = self._of_sets(limits)
        return self.pour.every_cost(tables, work) + self._ends_beside + self.trips

    def of_sets(self, sets: Ints, rows: Ints, limits: Limits) -> Floats:
        """T at least, whichever nodes are first and last."""
        tables, work = self._of_sets(limits)
        beside = self._ends_beside[sets] + self.trips[sets]
        found = [self.pour.costs(tables.of(sets[c], rows[c]), np.full(len(sets[c]), work)) for c in pieces(len(sets))]
        return np.concatenate([*found, np.zeros(0)]) + beside

    def _of_sets(self, limits: Limits) -> tuple[Tables, float]:
        beside = self._ends_work[:, None]
        least = (self.least - beside).min(axis=0)
        most = (limits.most - beside[:, :, None]).max(axis=0)
        return Tables(self.pour.terms(least, most)), float(self.chain.work[-1] - self._ends_work.sum())

    def rests(self, limits: Limits) -> Rests:
        """The bounds of what is left, within these limits."""
        return Rests(self, limits)


class Rests:
    """T without links, at least, of the layers from one on over exactly the nodes of a set."""

    def __init__(self, bounds: Bounds, limits: Limits) -> None:
        self._bounds, self._pour = bounds, bounds.pour
        inner, first, last = (
            bounds.pour.terms(own, most) for own, most in zip(bounds.least, limits.most, strict=True)
        )
        self._tables = Tables(inner)
        self._first, self._last = first, last

    def sums(self, rest: Ints, last: Ints, first: Ints | None, rows: Ints) -> Floats:
        """The sums for `costs`. `last` is the last of the nodes of `rest`, where there is any; `first`, when given,
        has layer 0."""
        ends = 1 << last
        if first is not None:
            ends |= 1 << first
        found = self._tables.of(rest & ~ends, rows)
        here = rest > 0
        of_last = self._last[:, last, rows]
        found += of_last if here.all() else np.where(here, of_last, 0.0)
        if first is not None:
            found += self._first[:, first, rows]
        return found

    def beside(self, rest: Ints, last: Ints, first: Ints | None) -> Floats:
        """What the ends cost beside that."""
        beside: Floats = np.where(rest > 0, self._bounds.beside_last[last], 0.0)
        return beside if first is None else beside + self._bounds.beside_first[first]

    def costs(self, sums: Floats, from_layer: Ints) -> Floats:
        """What the layers from `from_layer` on cost, without what is beside. Takes `sums`."""
        return self._pour.costs(sums, self._bounds.chain.work[-1] - self._bounds.chain.work[from_layer])


def pieces(count: int) -> list[slice]:
    """So many rows, in pieces of `ROWS_AT_ONCE`."""
    return [slice(at, at + ROWS_AT_ONCE) for at in range(0, count, ROWS_AT_ONCE)]
