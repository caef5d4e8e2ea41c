"""The bytes of stages and the costs of layouts: the only place with the formulas of `problem.py`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from shoal_placement.solver.problem import IN_FLIGHT_PER_STAGE, Layout, Node, Problem, StageSlice

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class CostModel:
    """A problem as prefix sums over its layers, with embedding and head added to the first and the last one.

    Only a single stage that has both ends of a tied model takes less than the sum of its layers: `tied_bytes` less.
    """

    def __init__(self, problem: Problem, nodes: Sequence[Node]) -> None:
        self.problem, self.nodes = problem, list(nodes)
        count = self.layer_count = len(problem.layer_bytes)
        work = [float(w) for w in problem.layer_work] or [1.0] * count
        taken = list(problem.layer_bytes)
        taken[0] += problem.embed_bytes
        taken[-1] += problem.head_bytes
        work[0] += problem.embed_work
        work[-1] += problem.head_work
        self.bytes: Ints = np.array([0, *accumulate(taken)], dtype=np.int64)
        self.work: Floats = np.array([0.0, *accumulate(work)])
        self.tied_bytes = problem.embed_bytes if problem.tied else 0
        self.free_bytes: Ints = np.array([n.free_bytes for n in self.nodes], dtype=np.int64)
        self.s_per_work: Floats = np.array([n.s_per_work for n in self.nodes], dtype=float)
        self.fetch: Ints = np.zeros((len(self.nodes), count + 1), dtype=np.int64)
        # Node by node: a large table in one call would block other threads.
        for i, node in enumerate(self.nodes):
            if node.fetch_bytes or node.fetch_embed_bytes or node.fetch_head_bytes:
                self.fetch[i] = _fetch(node, count)
        prices = np.array([n.price_s_per_byte for n in self.nodes])
        self.cost: Floats = (
            self.s_per_work[:, None] * self.work
            + prices[:, None] * self.bytes
            + problem.fetch_price_s_per_byte * self.fetch
        )
        """Of layers [0, j) on node i, the share of T and of the prices. A stage's cost is a difference of two."""
        self.required_counts: Ints = np.array(
            [problem.layer_counts.get(n.name, 0) for n in self.nodes], dtype=np.int64
        )

    def for_nodes(self, order: Sequence[int]) -> CostModel:
        """Return the chain over these nodes only, in this order."""
        subset = copy(self)
        subset.__dict__.pop("_memory_reach", None)
        index = list(order)
        subset.nodes = [self.nodes[i] for i in index]
        subset.free_bytes, subset.s_per_work, subset.required_counts = (
            self.free_bytes[index],
            self.s_per_work[index],
            self.required_counts[index],
        )
        subset.fetch, subset.cost = self.fetch[index], self.cost[index]
        return subset

    @cached_property
    def _memory_reach(self) -> Ints:
        """For each node and each first layer: one past the last layer that its memory holds."""
        capacity = self.free_bytes[:, None] - self.problem.stage_bytes
        end: Ints = np.searchsorted(self.bytes, (self.bytes + capacity).ravel(), side="right") - 1
        return end.reshape(len(self.nodes), -1)

    def reach(self, max_s: float | Floats) -> Ints:
        """Return for each node and first layer one past the last layer that a stage there can hold within `max_s`.

        It equals the first layer if the stage can hold none. It is right for stages that do not have both ends. With
        several times, it is returned for each of them.
        """
        limit_s = np.asarray(max_s, dtype=float)[..., None, None]
        first = np.arange(self.layer_count + 1)
        limited = limit_s < np.inf
        end = np.broadcast_to(self._memory_reach, (*limit_s.shape[:-2], *self._memory_reach.shape))
        if limited.any():
            with np.errstate(divide="ignore", invalid="ignore"):
                work = np.where(limited, limit_s, 0.0) / self.s_per_work[:, None]
            # A node that takes no time is limited by its memory only.
            work = np.where(limited & (self.s_per_work[:, None] > 0), work, np.inf)
            time_end = np.searchsorted(self.work, (self.work + work) * (1 + 1e-13), side="right") - 1
            end = np.minimum(end, time_end)
        reach: Ints = np.maximum(end, first)
        if not self.required_counts.any():
            return reach
        exact = first + self.required_counts[:, None]
        return np.where(self.required_counts[:, None] > 0, np.where(reach >= exact, exact, first), reach)

    def in_flight(self, stages: int) -> int:
        """Return C for so many stages."""
        return stages if self.problem.in_flight == IN_FLIGHT_PER_STAGE else self.problem.in_flight


def _fetch(node: Node, count: int) -> list[int]:
    by_layer = list(node.fetch_bytes) or [0] * count
    by_layer[0] += node.fetch_embed_bytes
    by_layer[-1] += node.fetch_head_bytes
    return [0, *accumulate(by_layer)]


def stage_bytes(problem: Problem, first: int, last: int) -> int:
    """Return the bytes of the stage with layers [first, last)."""
    is_first, is_last = first == 0, last == len(problem.layer_bytes)
    size = problem.stage_bytes + sum(problem.layer_bytes[first:last])
    size += (problem.embed_bytes if is_first else 0) + (problem.head_bytes if is_last else 0)
    return size - (problem.embed_bytes if problem.tied and is_first and is_last else 0)


def make_layout(
    problem: Problem, order: Sequence[int], cuts: Sequence[int], chain: CostModel | None = None
) -> Layout:
    """Return the layout with layers [cuts[i], cuts[i + 1]) on the i-th node of `order`, indices into `problem.nodes`.

    `chain`, if given, is the chain of the problem over all its nodes.
    """
    nodes = [problem.nodes[i] for i in order]
    in_chain: Sequence[int] = order
    if chain is None:
        chain, in_chain = CostModel(problem, nodes), range(len(nodes))
    slices = [
        StageSlice(n.name, a, b, stage_bytes(problem, a, b)) for n, (a, b) in zip(nodes, pairwise(cuts), strict=True)
    ]
    times = [
        float(chain.s_per_work[i] * (chain.work[s.last] - chain.work[s.first]))
        for i, s in zip(in_chain, slices, strict=True)
    ]
    fetch = sum(int(chain.fetch[i, s.last] - chain.fetch[i, s.first]) for i, s in zip(in_chain, slices, strict=True))
    if len(nodes) == 1 and problem.tied:
        fetch -= min(nodes[0].fetch_embed_bytes, nodes[0].fetch_head_bytes)
    links = 0.0
    if len(problem.link_s) and len(order) > 1:
        links = sum(float(problem.link_s[a][b]) for a, b in pairwise([*order, order[0]]))
    latency, bottleneck = sum(times) + links, max(times)
    prices = fetch * problem.fetch_price_s_per_byte
    prices += sum(n.price_s_per_byte * s.bytes for n, s in zip(nodes, slices, strict=True))
    # The fixed bytes of a stage have no price: another stage is paid for by its link.
    prices -= sum(n.price_s_per_byte for n in nodes) * problem.stage_bytes
    return Layout(
        slices=slices,
        latency_s=latency,
        bottleneck_s=bottleneck,
        fetch_bytes=fetch,
        max_memory_share=max(
            s.bytes / n.free_bytes if n.free_bytes > 0 else float("inf") for n, s in zip(nodes, slices, strict=True)
        ),
        cost_s=max(latency + prices, chain.in_flight(len(order)) * bottleneck),
    )


def meets_constraints(problem: Problem, layout: Layout) -> bool:
    """Return whether a layout meets all constraints: memory, numbers of nodes and of layers, bytes to fetch."""
    layer_count = {s.node: s.last - s.first for s in layout.slices}
    free = {n.name: n.free_bytes for n in problem.nodes if n.name in layer_count}
    return (
        problem.min_nodes <= len(layout.slices) <= problem.max_nodes
        and all(s.bytes <= free[s.node] and s.first < s.last for s in layout.slices)
        and all(layer_count.get(node) == count for node, count in problem.layer_counts.items())
        and (problem.max_fetch_bytes is None or layout.fetch_bytes <= problem.max_fetch_bytes)
    )
