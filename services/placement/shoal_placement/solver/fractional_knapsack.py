"""Work assigned to the nodes of a set in fractions, the cheapest node first, for many sets at once.

Each node takes its smallest share, and beyond that up to its spare capacity, at its rate. The cost is a linear
program, equal to its dual: over all prices p of a unit of work the greatest

    p * work - sum over the set of (own * (p - rate) + spare * max(p - rate, 0))

where `own` is the smallest share, and the best price is always one of the nodes' rates. For each price this is a sum
over the set, so a few small tables, each of all subsets of a few nodes, give it for every subset in a few additions.
"""

from __future__ import annotations

import numpy as np

from shoal_placement.solver.cost import Floats, Ints

COST_TOLERANCE = 1e-9
"""Costs that differ by less than this share are equal."""
_BITS = 6
"""Nodes whose subsets are in one table."""


class FractionalAssignment:
    """The cost to assign work to nodes with these rates; `whole` is all the work there is."""

    def __init__(self, rate: Floats, total_work: float) -> None:
        self._rate = rate
        prices = np.unique(rate)
        self._prices = len(prices)
        self._slope: Floats = np.array([*prices, 1.0, -1.0])
        """What a unit of work adds to each sum: one for each price, the lack of capacity, and the lack of work."""
        self._tolerance = COST_TOLERANCE * total_work

    def terms(self, min_work: Floats, max_work: Floats) -> Floats:
        """Return what each node adds to each sum, by sum, node and row.

        A node takes at least `own` (by node), and at most `most` (by node and row), or `own` if that is more.
        """
        prices = self._slope[: self._prices, None, None]
        over = prices - self._rate[:, None]
        min_work = min_work[:, None]
        spare = np.maximum(max_work - min_work, 0.0)
        terms: Floats = np.empty((self._prices + 2, *max_work.shape))
        terms[:-2] = -min_work * over - spare * np.maximum(over, 0.0)
        terms[-2] = -(min_work + spare)
        terms[-1] = min_work
        return terms

    def costs(self, sums: Floats, work: Floats) -> Floats:
        """Return the cost of each set from the sums of its nodes' terms; infinite if the work does not fit.

        It overwrites `sums`.
        """
        sums += self._slope[:, None] * work
        cost: Floats = sums[:-2].max(axis=0)
        cost[np.maximum(sums[-2], sums[-1]) > self._tolerance] = np.inf
        return cost

    def costs_of_all_sets(self, tables: SubsetSums, work: float) -> Floats:
        """Return the cost of every subset, in the first row."""
        high, low = tables.halves()
        shape = (high.shape[1], low.shape[1])
        cost, lack, sums = np.full(shape, -np.inf), np.full(shape, -np.inf), np.empty(shape)
        for i, slope in enumerate(self._slope):
            np.add((high[i] + slope * work)[:, None], low[i], out=sums)
            most = cost if i < self._prices else lack
            np.maximum(most, sums, out=most)
        cost[lack > self._tolerance] = np.inf
        return cost.ravel()


class SubsetSums:
    """The sums of terms over the nodes of any subset."""

    def __init__(self, terms: Floats) -> None:
        self._tables = [_sums(terms[:, start : start + _BITS]) for start in range(0, terms.shape[1], _BITS)]
        """Each by sum, row and subset of a few nodes, in the order of the nodes."""

    def sums_of(self, sets: Ints, rows: Ints) -> Floats:
        """Return the sums by sum and set; `rows` has the row of each set."""
        total: Floats | None = None
        for table in self._tables:
            count = table.shape[2]
            sums = table.reshape(len(table), -1).take(rows * count + (sets & (count - 1)), axis=1)
            total = sums if total is None else np.add(total, sums, out=total)
            sets = sets >> _BITS
        assert total is not None
        return total

    def halves(self) -> tuple[Floats, Floats]:
        """Return the sums by sum and subset, in the first row: of all nodes but the first few, and of those."""
        low, *others = (table[:, 0] for table in self._tables)
        high = np.zeros((len(low), 1))
        for table in others:
            high = (table[:, :, None] + high[:, None, :]).reshape(len(low), -1)
        return high, low


def _sums(terms: Floats) -> Floats:
    """Return the sums by sum, row and subset."""
    count, nodes, rows = terms.shape
    sums = np.zeros((count, rows, 1))
    for node in range(nodes):
        sums = np.concatenate([sums, sums + terms[:, node, :, None]], axis=2)
    return sums
