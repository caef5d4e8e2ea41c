"""What stages take and what layouts cost: the one place with the formulas of `problem.py`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from shoal_placement.solve.problem import AS_STAGES, Layout, Node, Problem, Slice

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Chain:
    """A problem as prefix sums over its layers, embedding and head folded into the first and the last one.

    Only a single stage that has both ends of a tied model takes less than its layers' sum: `tied_bytes` less.
    """

    def __init__(self, problem: Problem, nodes: Sequence[Node]) -> None:
        self.problem, self.nodes = problem, list(nodes)
        count = self.layers = len(problem.layer_bytes)
        work = [float(w) for w in problem.layer_work] or [1.0] * count
        taken = list(problem.layer_bytes)
        taken[0] += problem.embed_bytes
        taken[-1] += problem.head_bytes
        work[0] += problem.embed_work
        work[-1] += problem.head_work
        self.bytes: Ints = np.array([0, *accumulate(taken)], dtype=np.int64)
        self.work: Floats = np.array([0.0, *accumulate(work)])
        self.tied_bytes = problem.embed_bytes if problem.tied else 0
        self.free: Ints = np.array([n.free_bytes for n in self.nodes], dtype=np.int64)
        self.s_per_work: Floats = np.array([n.s_per_work for n in self.nodes], dtype=float)
        self.fetch: Ints = np.zeros((len(self.nodes), count + 1), dtype=np.int64)
        # Node by node: all at once would keep other threads waiting for as long as a large table takes.
        for i, node in enumerate(self.nodes):
            if node.fetch_bytes or node.fetch_embed_bytes or node.fetch_head_bytes:
                self.fetch[i] = _fetch(node, count)
        prices = np.array([n.price_s_per_byte for n in self.nodes])
        self.cost: Floats = (
            self.s_per_work[:, None] * self.work
            + prices[:, None] * self.bytes
            + problem.fetch_price_s_per_byte * self.fetch
        )
        """Of node i, to layer j: its share of T and of the prices. A stage's are a difference of two."""
        self.fixed: Ints = np.array([problem.counts.get(n.name, 0) for n in self.nodes], dtype=np.int64)

    def part(self, order: Sequence[int]) -> Chain:
        """The same over these nodes only, in this order."""
        found = copy(self)
        found.__dict__.pop("_held", None)
        places = list(order)
        found.nodes = [self.nodes[i] for i in places]
        found.free, found.s_per_work, found.fixed = self.free[places], self.s_per_work[places], self.fixed[places]
        found.fetch, found.cost = self.fetch[places], self.cost[places]
        return found

    @cached_property
    def _held(self) -> Ints:
        """For each node and each first layer: one past the last that its memory holds."""
        room = self.free[:, None] - self.problem.stage_bytes
        far: Ints = np.searchsorted(self.bytes, (self.bytes + room).ravel(), side="right") - 1
        return far.reshape(len(self.nodes), -1)

    def reach(self, most_s: float | Floats) -> Ints:
        """For each node and each first layer: one past the last that a stage there can hold within `most_s` of time.

        No layer at all where it is the first itself. Right for stages that do not have both ends. Of several times
        for each of them.
        """
        most = np.asarray(most_s, dtype=float)[..., None, None]
        first = np.arange(self.layers + 1)
        timed = most < np.inf
        far = np.broadcast_to(self._held, (*most.shape[:-2], *self._held.shape))
        if timed.any():
            with np.errstate(divide="ignore", invalid="ignore"):
                span = np.where(timed, most, 0.0) / self.s_per_work[:, None]
            # A node that takes no time at all has as much as it holds.
            span = np.where(timed & (self.s_per_work[:, None] > 0), span, np.inf)
            until = np.searchsorted(self.work, (self.work + span) * (1 + 1e-13), side="right") - 1
            far = np.minimum(far, until)
        found: Ints = np.maximum(far, first)
        if not self.fixed.any():
            return found
        exact = first + self.fixed[:, None]
        return np.where(self.fixed[:, None] > 0, np.where(found >= exact, exact, first), found)

    def in_flight(self, stages: int) -> int:
        """C for so many stages."""
        return stages if self.problem.in_flight == AS_STAGES else self.problem.in_flight


def _fetch(node: Node, count: int) -> list[int]:
    own = list(node.fetch_bytes) or [0] * count
    own[0] += node.fetch_embed_bytes
    own[-1] += node.fetch_head_bytes
    return [0, *accumulate(own)]


def stage_bytes(problem: Problem, first: int, last: int) -> int:
    """Bytes of the stage with layers [first, last)."""
    begins, ends = first == 0, last == len(problem.layer_bytes)
    own = problem.stage_bytes + sum(problem.layer_bytes[first:last])
    own += (problem.embed_bytes if begins else 0) + (problem.head_bytes if ends else 0)
    return own - (problem.embed_bytes if problem.tied and begins and ends else 0)


def layout_of(problem: Problem, order: Sequence[int], cuts: Sequence[int], chain: Chain | None = None) -> Layout:
    """The layout with these nodes (places in `problem.nodes`), and layers [cuts[i], cuts[i + 1]) on each.

    `chain`, where it is at hand, is the problem's over all its nodes.
    """
    nodes = [problem.nodes[i] for i in order]
    own: Sequence[int] = order
    if chain is None:
        chain, own = Chain(problem, nodes), range(len(nodes))
    slices = [
        Slice(n.name, a, b, stage_bytes(problem, a, b)) for n, (a, b) in zip(nodes, pairwise(cuts), strict=True)
    ]
    times = [
        float(chain.s_per_work[i] * (chain.work[s.last] - chain.work[s.first]))
        for i, s in zip(own, slices, strict=True)
    ]
    fetch = sum(int(chain.fetch[i, s.last] - chain.fetch[i, s.first]) for i, s in zip(own, slices, strict=True))
    if len(nodes) == 1 and problem.tied:
        fetch -= min(nodes[0].fetch_embed_bytes, nodes[0].fetch_head_bytes)
    links = 0.0
    if len(problem.link_s) and len(order) > 1:
        links = sum(float(problem.link_s[a][b]) for a, b in pairwise([*order, order[0]]))
    latency, bottleneck = sum(times) + links, max(times)
    prices = fetch * problem.fetch_price_s_per_byte
    prices += sum(n.price_s_per_byte * s.bytes for n, s in zip(nodes, slices, strict=True))
    # What every stage takes whatever it has costs nothing: it is paid for with the link.
    prices -= sum(n.price_s_per_byte for n in nodes) * problem.stage_bytes
    return Layout(
        slices=slices,
        latency_s=latency,
        bottleneck_s=bottleneck,
        fetch_bytes=fetch,
        fullest=max(
            s.bytes / n.free_bytes if n.free_bytes > 0 else float("inf") for n, s in zip(nodes, slices, strict=True)
        ),
        cost_s=max(latency + prices, chain.in_flight(len(order)) * bottleneck),
    )


def keeps(problem: Problem, layout: Layout) -> bool:
    """Whether a layout keeps all that is asked: memory, counts of nodes and of layers, bytes to fetch."""
    given = {s.node: s.last - s.first for s in layout.slices}
    free = {n.name: n.free_bytes for n in problem.nodes if n.name in given}
    return (
        problem.min_nodes <= len(layout.slices) <= problem.max_nodes
        and all(s.bytes <= free[s.node] and s.first < s.last for s in layout.slices)
        and all(given.get(node) == count for node, count in problem.counts.items())
        and (problem.max_fetch_bytes is None or layout.fetch_bytes <= problem.max_fetch_bytes)
    )
