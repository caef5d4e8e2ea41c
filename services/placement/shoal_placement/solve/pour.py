"""Work poured into the nodes of a set, the cheapest first, for many sets at once.

Each node takes its smallest share, and beyond it what it has to spare, at its rate. What that costs is a linear
program, and the same as its dual: over all prices p of a unit of work the greatest

    p * work - sum over the set of (own * (p - rate) + spare * max(p - rate, 0))

and one of the nodes' rates is always such a price. For each price this is a sum over the set, so two tables, one for
each half of the nodes, give it for every subset in one addition.
"""

from __future__ import annotations

import numpy as np

from shoal_placement.solve.cost import Floats, Ints

CLOSE = 1e-9
"""Costs that differ by less than this share are the same."""


class Pour:
    """What it costs to pour work into nodes with these rates, `whole` being all the work there is."""

    def __init__(self, rate: Floats, whole: float) -> None:
        self._rate = rate
        prices = np.unique(rate)
        self._prices = len(prices)
        self._slope: Floats = np.array([*prices, 1.0, -1.0])
        """What a unit of work adds to each sum: those of the prices, the lack of room, and the lack of work."""
        self._tolerance = CLOSE * whole

    def terms(self, own: Floats, most: Floats) -> Floats:
        """What each node adds to each sum, by sum, node and row: it takes `own` (by node) at least, and at most
        `most` (by node and row) or that."""
        prices = self._slope[: self._prices, None, None]
        over = prices - self._rate[:, None]
        own = own[:, None]
        spare = np.maximum(most - own, 0.0)
        found: Floats = np.empty((self._prices + 2, *most.shape))
        found[:-2] = -own * over - spare * np.maximum(over, 0.0)
        found[-2] = -(own + spare)
        found[-1] = own
        return found

    def costs(self, sums: Floats, work: Floats) -> Floats:
        """Of each set, by the terms of its nodes summed up: infinite where the work does not fit. Takes `sums`."""
        sums += self._slope[:, None] * work
        cost: Floats = sums[:-2].max(axis=0)
        cost[np.maximum(sums[-2], sums[-1]) > self._tolerance] = np.inf
        return cost

    def every_cost(self, tables: Tables, work: float) -> Floats:
        """Of every subset, in the first row."""
        found: Floats | None = None
        never: Floats = np.full(1, -np.inf)
        for i, slope in enumerate(self._slope):
            sums = (tables.high[i, : tables.high_count, None] + slope * work) + tables.low[i, : tables.low_count]
            if i >= self._prices:
                never = np.maximum(never, sums)
            else:
                found = sums if found is None else np.maximum(found, sums, out=found)
        assert found is not None
        found[never > self._tolerance] = np.inf
        return found.ravel()


class Tables:
    """The sums of terms over the nodes of any subset."""

    def __init__(self, terms: Floats) -> None:
        count = terms.shape[1]
        self._bits = (count + 1) // 2
        self.low, self.low_count = _sums(terms[:, : self._bits]), 1 << self._bits
        self.high, self.high_count = _sums(terms[:, self._bits :]), 1 << (count - self._bits)

    def of(self, sets: Ints, rows: Ints) -> Floats:
        """By sum and set."""
        found: Floats = self.high.take((rows * self.high_count) + (sets >> self._bits), axis=1)
        found += self.low.take((rows * self.low_count) + (sets & (self.low_count - 1)), axis=1)
        return found


def _sums(terms: Floats) -> Floats:
    """By sum, and by row and subset together."""
    count, nodes, rows = terms.shape
    found = np.zeros((count, rows, 1))
    for node in range(nodes):
        found = np.concatenate([found, found + terms[:, node, :, None]], axis=2)
    return found.reshape(count, -1)
