"""Whether a set of nodes can hold the layers at all, each at least one of them: by memory and asked counts, exactly.

From the back: of each subset all layers are known from which on it can hold the rest. A node beside that subset can
begin wherever it reaches one of them. O(2^n n L); asked only where the search has found nothing for a count of nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal_placement.solve.cost import Chain, Ints
from shoal_placement.solve.subsets import sizes


class Fits:
    """For each subset of at most `subsets.MOST` nodes, from which layers on it can hold the rest."""

    def __init__(self, chain: Chain) -> None:
        self._chain, self._reach = chain, chain.reach(float("inf"))
        count, layers = len(chain.nodes), chain.layers
        self._from: NDArray[np.bool_] = np.zeros((1 << count, layers + 1), dtype=bool)
        self._from[0, layers] = True
        everything, size = np.arange(1 << count), sizes(count)
        for k in range(1, count + 1):
            # How many such layers there are up to each one, for the subsets with a node less.
            smaller = everything[size == k - 1]
            known = np.zeros((len(smaller), layers + 2), dtype=np.int16)
            np.cumsum(self._from[smaller], axis=1, out=known[:, 1:])
            row_of = np.zeros(1 << count, dtype=np.int64)
            row_of[smaller] = np.arange(len(smaller))
            own = everything[size == k]
            for node in range(count):
                having = own[(own >> node) & 1 == 1]
                before = known[row_of[having ^ (1 << node)]]
                self._from[having] |= self._begins(node, before)

    def _begins(self, node: int, known: NDArray[np.int16]) -> NDArray[np.bool_]:
        """The layers at which this node can begin and end where the others begin."""
        reach = self._reach[node]
        starts = np.arange(self._chain.layers + 1)
        # One with a count of its own ends where it reaches, any other somewhere up to there.
        lowest = np.where(self._chain.fixed[node] > 0, np.maximum(reach - 1, starts), starts)
        found: NDArray[np.bool_] = known[:, reach + 1] > known[:, lowest + 1]
        return found

    def __call__(self, sets: Ints) -> NDArray[np.bool_]:
        """Which of these sets can hold all layers."""
        found: NDArray[np.bool_] = self._from[sets, 0]
        return found

    def layout(self, subset: int) -> tuple[list[int], list[int]]:
        """An order of a set that can, and where to cut the layers."""
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
        return range(reach, first, -1)[: 1 if self._chain.fixed[node] else None]
