"""Work poured into the nodes of a set, the cheapest first, for many sets at once.

Each node takes its smallest share, and beyond it what it has to spare, at its rate. What that costs is a linear
program, and the same as its dual: over all prices p of a unit of work the greatest

    p * work - sum over the set of (own * (p - rate) + spare * max(p - rate, 0))

and one of the nodes' rates is always such a price. For each price this is a sum over the set, so a few small tables,
each of all subsets of a few nodes, give it for every subset in as many additions.
"""

from __future__ import annotations

import numpy as np

from shoal_placement.solve.cost import Floats, Ints

CLOSE = 1e-9
"""Costs that differ by less than this share are the same."""
_BITS = 6
"""Nodes whose subsets are in one table."""


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
        high, low = tables.halves()
        shape = (high.shape[1], low.shape[1])
        cost, lack, sums = np.full(shape, -np.inf), np.full(shape, -np.inf), np.empty(shape)
        for i, slope in enumerate(self._slope):
            np.add((high[i] + slope * work)[:, None], low[i], out=sums)
            most = cost if i < self._prices else lack
            np.maximum(most, sums, out=most)
        cost[lack > self._tolerance] = np.inf
        return cost.ravel()


class Tables:
    """The sums of terms over the nodes of any subset."""

    def __init__(self, terms: Floats) -> None:
        self._parts = [_sums(terms[:, at : at + _BITS]) for at in range(0, terms.shape[1], _BITS)]
        """By sum, row and subset of these nodes; each part has the next few nodes."""

    def of(self, sets: Ints, rows: Ints) -> Floats:
        """By sum and set."""
        found: Floats | None = None
        for part in self._parts:
            count = part.shape[2]
            sums = part.reshape(len(part), -1).take(rows * count + (sets & (count - 1)), axis=1)
            found = sums if found is None else np.add(found, sums, out=found)
            sets = sets >> _BITS
        assert found is not None
        return found

    def halves(self) -> tuple[Floats, Floats]:
        """By sum and subset, in the first row: of the last nodes, and of the first ones."""
        low, *others = (part[:, 0] for part in self._parts)
        high = np.zeros((len(low), 1))
        for part in others:
            high = (part[:, :, None] + high[:, None, :]).reshape(len(low), -1)
        return high, low


def _sums(terms: Floats) -> Floats:
    """By sum, row and subset."""
    count, nodes, rows = terms.shape
    found = np.zeros((count, rows, 1))
    for node in range(nodes):
        found = np.concatenate([found, found + terms[:, node, :, None]], axis=2)
    return found
