"""Whether a set of nodes can hold all layers, each node at least one: by memory and required counts, exactly.

It works from the last layer back: for each subset of nodes, the set of layers from which on it can hold the rest. One
more node can start at any layer from which it reaches one of those. O(2^n n L); used only if the search has found
nothing for a number of nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal_placement.solver.cost import CostModel, Ints
from shoal_placement.solver.subsets import subset_sizes


class Feasibility:
    """For each subset of at most `subsets.MOST` nodes, the layers from which on it can hold the rest."""

    def __init__(self, chain: CostModel) -> None:
        self._chain, self._reach = chain, chain.reach(float("inf"))
        count, layers = len(chain.nodes), chain.layer_count
        self._from: NDArray[np.bool_] = np.zeros((1 << count, layers + 1), dtype=bool)
        self._from[0, layers] = True
        everything, size = np.arange(1 << count), subset_sizes(count)
        for k in range(1, count + 1):
            # For the subsets with one node less: how many such layers there are up to each one.
            smaller = everything[size == k - 1]
            known = np.zeros((len(smaller), layers + 2), dtype=np.int16)
            np.cumsum(self._from[smaller], axis=1, out=known[:, 1:])
            row_of = np.zeros(1 << count, dtype=np.int64)
            row_of[smaller] = np.arange(len(smaller))
            subsets = everything[size == k]
            for node in range(count):
                with_node = subsets[(subsets >> node) & 1 == 1]
                before = known[row_of[with_node ^ (1 << node)]]
                self._from[with_node] |= self._begins(node, before)

    def _begins(self, node: int, known: NDArray[np.int16]) -> NDArray[np.bool_]:
        """Return the layers at which this node can start so that it ends where the others start."""
        reach = self._reach[node]
        starts = np.arange(self._chain.layer_count + 1)
        # A node with a required count ends exactly where it reaches, any other somewhere up to there.
        lowest = np.where(self._chain.required_counts[node] > 0, np.maximum(reach - 1, starts), starts)
        can_start: NDArray[np.bool_] = known[:, reach + 1] > known[:, lowest + 1]
        return can_start

    def __call__(self, sets: Ints) -> NDArray[np.bool_]:
        """Return which of these sets can hold all layers."""
        feasible: NDArray[np.bool_] = self._from[sets, 0]
        return feasible

    def layout(self, subset: int) -> tuple[list[int], list[int]]:
        """Return an order and the cuts of a feasible set."""
        order: list[int] = []
        cuts = [0]
        while subset:
            node, end = next(
                (node, end)
                for node in range(len(self._chain.nodes))
                if subset >> node & 1
                for end in self._ends(node, cuts[-1])
                if self._from[subset ^ (1 << node), end]
            )
            order.append(node)
            cuts.append(end)
            subset ^= 1 << node
        return order, cuts

    def _ends(self, node: int, first: int) -> range:
        reach = int(self._reach[node, first])
        return range(reach, first, -1)[: 1 if self._chain.required_counts[node] else None]
