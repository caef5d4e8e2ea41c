"""For more nodes than all subsets can be enumerated of: the exact search within neighborhoods, and a bound for all.

A neighborhood is the nodes that suit a layout around one of them, its seed, best: fast ones with short links to it.
Neighborhoods are searched in the order of their lower bounds, until none can be better. Layouts over more nodes than
a neighborhood has are built greedily: nodes by speed and memory, an order by the nearest node next and then by moving
nodes, and the cheapest split over it. They are not proved to be the best; the bound says how far off they can be.

The bound: a node that takes part costs half its shortest link in and half its shortest link out. Spread over the work
that it can take, that is a price on each unit, and the work is assigned to the cheapest nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import msgspec
import numpy as np

from shoal_placement.solver import branch_and_bound
from shoal_placement.solver.balance import cheapest_cuts
from shoal_placement.solver.beam_search import INF
from shoal_placement.solver.bounds import ROLE_FIRST, ROLE_INNER, ROLE_LAST, BoundContext
from shoal_placement.solver.branch_and_bound import best_single_node, link_table
from shoal_placement.solver.cost import CostModel, Floats, Ints, make_layout, meets_constraints
from shoal_placement.solver.problem import Layout, Problem, Solution
from shoal_placement.solver.subsets import MAX_NODES

NEIGHBORHOOD_SIZE = 12
_SEARCHES = 8
_PREVIEW_SEARCHES = 3
_EFFORT = branch_and_bound.SearchEffort(max_partial_layouts=60_000)
_ROUNDS = 12
_STARTS = 2
_SEEDS_PER_BATCH = 32
_SPLITS = 4
"""Bottlenecks that are tried for a round trip."""


class LargeProblem:
    """A problem with many nodes, and the rate, the links and the greatest work of each node."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.chain = CostModel(problem, problem.nodes)
        self.link_s = link_table(problem)
        self.count = len(problem.nodes)
        by_layer = np.diff(self.chain.cost, axis=1) / np.diff(self.chain.work)
        self.cost_per_work: Floats = by_layer.min(axis=1)
        np.fill_diagonal(self.link_s, INF)
        self.half_link_s: Floats = (self.link_s.min(axis=0) + self.link_s.min(axis=1)) / 2
        np.fill_diagonal(self.link_s, 0.0)
        self.required_nodes = [int(i) for i in np.flatnonzero(self.chain.required_counts)]

    def max_work(self, slowest_s: float) -> Floats:
        """Return the most work that each node can take within a bottleneck."""
        max_work = BoundContext(self.chain, np.array([slowest_s])).max_work[:, :, 0]
        largest: Floats = np.maximum(np.maximum(max_work[ROLE_INNER], max_work[ROLE_FIRST]), max_work[ROLE_LAST])
        return largest

    @cached_property
    def lower_bound(self) -> float:
        """No layout costs less."""
        low = self._least(INF)
        flight = self.chain.in_flight(max(self.problem.min_nodes, 2))
        if flight > 1 and low < INF:
            high = low * flight
            for _ in range(_ROUNDS):
                middle = (low * high) ** 0.5
                if self._least(middle / flight) >= middle:
                    low = middle
                else:
                    high = middle
        return low

    def _least(self, slowest_s: float) -> float:
        max_work = self.max_work(slowest_s)
        usable = max_work > 0
        rate = np.where(usable, self.cost_per_work + self.half_link_s / np.where(usable, max_work, 1.0), INF)
        return float(fractional_cost(rate[None, :], max_work[None, :], float(self.chain.work[-1]))[0])

    def for_nodes(self, chosen: Sequence[int]) -> Problem:
        """Return the problem with these nodes only."""
        nodes = [self.problem.nodes[i] for i in chosen]
        return msgspec.structs.replace(self.problem, nodes=nodes, link_s=self.link_s[np.ix_(chosen, chosen)].tolist())


def fractional_cost(rate: Floats, max_work: Floats, work: float) -> Floats:
    """Return for each row the cost of the work, assigned to the cheapest nodes first; infinite if it does not fit."""
    ranked = np.argsort(rate, axis=1, kind="stable")
    rate, max_work = np.take_along_axis(rate, ranked, axis=1), np.take_along_axis(max_work, ranked, axis=1)
    filled = np.minimum(np.cumsum(max_work, axis=1), work)
    assigned = np.diff(filled, axis=1, prepend=0.0)
    cost: Floats = (np.where(assigned > 0, rate, 0.0) * assigned).sum(axis=1)
    return np.where(filled[:, -1] >= work * (1 - 1e-9), cost, INF)


def best(problem: Problem) -> Solution:
    """Return the best layout found over any number of nodes."""
    return _best(LargeProblem(problem), _EFFORT, _SEARCHES)


def _best(cluster: LargeProblem, effort: branch_and_bound.SearchEffort, searches: int) -> Solution:
    problem, lower = cluster.problem, cluster.lower_bound
    best_layout: Layout | None = None
    if problem.min_nodes <= 1 <= problem.max_nodes:
        best_layout = best_single_node(problem, cluster.chain).layout
        lower = min(lower, _cost(best_layout))
    for pool, least in _neighborhoods(cluster, NEIGHBORHOOD_SIZE)[:searches]:
        if least >= _cost(best_layout):
            break
        layout = branch_and_bound.best(cluster.for_nodes(pool), effort, _cost(best_layout)).layout
        if layout is not None and layout.cost_s < _cost(best_layout):
            best_layout = layout
    if best_layout is None or len(best_layout.slices) >= NEIGHBORHOOD_SIZE:
        for layout in _greedy_layouts(cluster, range(max(problem.min_nodes, 2), _max_stages(problem) + 1)).values():
            if layout.cost_s < _cost(best_layout):
                best_layout = layout
    return _answer(best_layout, lower)


def best_for_each_count(problem: Problem) -> dict[int, Solution]:
    """Return the best layout found over exactly k nodes, for each k that is allowed."""
    cluster = LargeProblem(problem)
    layouts: dict[int, Layout] = {}
    pools = _neighborhoods(cluster, MAX_NODES)
    for pool, _ in pools[:1] + [p for p in pools[1:2] if cluster.count > 4 * MAX_NODES]:
        for k, answer in branch_and_bound.best_for_each_count(
            cluster.for_nodes(pool), branch_and_bound.SHORT_EFFORT
        ).items():
            if answer.layout is not None and answer.layout.cost_s < _cost(layouts.get(k)):
                layouts[k] = answer.layout
    overall = _best(cluster, branch_and_bound.SHORT_EFFORT, _PREVIEW_SEARCHES).layout
    if overall is not None and overall.cost_s < _cost(layouts.get(len(overall.slices))):
        layouts[len(overall.slices)] = overall
    counts = range(max(problem.min_nodes, 2), _max_stages(problem) + 1)
    layouts.update(_greedy_layouts(cluster, [k for k in counts if k not in layouts]))
    answers = {k: _answer(layouts.get(k), cluster.lower_bound) for k in counts}
    if problem.min_nodes <= 1 <= problem.max_nodes:
        answers[1] = best_single_node(problem, cluster.chain)
    return answers


def _max_stages(problem: Problem) -> int:
    return min(problem.max_nodes, len(problem.nodes), len(problem.layer_bytes))


def _cost(layout: Layout | None) -> float:
    return INF if layout is None else layout.cost_s


def _answer(layout: Layout | None, lower: float) -> Solution:
    cost = _cost(layout)
    # If the work cannot be assigned even in fractions, nothing fits.
    return Solution(layout, min(lower, cost), proved=lower >= cost * (1 - 1e-9) if layout else lower == INF)


def _neighborhoods(cluster: LargeProblem, size: int) -> list[tuple[list[int], float]]:
    """Return sets of nodes to search in, each with a lower bound of the cost; the most promising first."""
    size = min(size, cluster.count)
    flight = cluster.chain.in_flight(min(size, NEIGHBORHOOD_SIZE))
    slowest_s = 2 * cluster.lower_bound / flight if flight > 1 else INF
    max_work = cluster.max_work(slowest_s)
    usable = np.flatnonzero(max_work > 0)
    if len(usable) < 2:
        return []
    size = min(size, len(usable))
    # A few seeds at a time: a large table in one call would block other threads.
    pools: Ints = np.concatenate(
        [
            _around(cluster, usable[start : start + _SEEDS_PER_BATCH], usable, max_work, size)
            for start in _starts(len(usable))
        ]
    )
    pools = np.unique(pools, axis=0)
    # No link is shorter than the shortest one within the neighborhood.
    links_of = np.concatenate(
        [_shortest_within(cluster, pools[start : start + _SEEDS_PER_BATCH]) for start in _starts(len(pools))]
    )
    rate = cluster.cost_per_work[pools] + links_of / max_work[pools]
    least = fractional_cost(rate, max_work[pools], float(cluster.chain.work[-1]))
    ranked = np.argsort(least, kind="stable")
    return [([int(i) for i in pools[row]], float(least[row])) for row in ranked if least[row] < INF]


def _starts(count: int) -> range:
    return range(0, count, _SEEDS_PER_BATCH)


def _around(cluster: LargeProblem, seeds: Ints, usable: Ints, max_work: Floats, size: int) -> Ints:
    """Return for each seed the nodes that suit it best, itself among them."""
    to_seed = (cluster.link_s[seeds] + cluster.link_s[:, seeds].T)[:, usable] / 2
    score = cluster.cost_per_work[usable] + to_seed / max_work[usable]
    score[seeds[:, None] == usable] = -INF
    score[:, np.isin(usable, cluster.required_nodes)] = -INF
    nearest: Ints = usable[np.sort(np.argpartition(score, size - 1, axis=1)[:, :size], axis=1)]
    return nearest


def _shortest_within(cluster: LargeProblem, pools: Ints) -> Floats:
    within = cluster.link_s[pools[:, :, None], pools[:, None, :]]
    within = within + np.where(np.eye(pools.shape[1], dtype=bool), INF, 0.0)
    shortest: Floats = (within.min(axis=1) + within.min(axis=2)) / 2
    return shortest


# Layouts over more nodes than a neighborhood has


def _greedy_layouts(cluster: LargeProblem, counts: Sequence[int]) -> dict[int, Layout]:
    """Return a good layout over exactly k nodes, for each of these k for which one is found."""
    layouts: dict[int, Layout] = {}
    for k in counts:
        nodes = _choose_nodes(cluster, k)
        layout = None if nodes is None else _split(cluster, _short_round_trip(cluster.link_s, nodes))
        if layout is not None:
            layouts[k] = layout
    return layouts


def _choose_nodes(cluster: LargeProblem, count: int) -> list[int] | None:
    """Return so many nodes with enough memory: the fastest, and if these have too little, more and more by memory."""
    max_work = cluster.max_work(INF)
    work = float(cluster.chain.work[-1])
    rate = cluster.cost_per_work + cluster.half_link_s / np.maximum(max_work, 1e-12)
    rate[cluster.required_nodes] = -INF
    spread = max(float(np.ptp(cluster.cost_per_work)), 1e-12) / max(float(max_work.max()), 1e-12)
    for weight in (0.0, 0.25, 1.0, 4.0, 64.0):
        chosen = np.argsort(rate - weight * spread * max_work, kind="stable")[:count]
        if max_work[chosen].min() > 0 and max_work[chosen].sum() >= work:
            return sorted(int(i) for i in chosen)
    return None


def _short_round_trip(link_s: Floats, nodes: list[int]) -> list[int]:
    """Return an order with a short round trip: the nearest node next, then nodes moved while that shortens it."""
    left, order = set(nodes[1:]), [nodes[0]]
    while left:
        from_last = link_s[order[-1]]
        order.append(min(left, key=lambda n: (from_last[n], n)))
        left.remove(order[-1])
    for _ in range(3):
        moved = False
        for node in nodes:
            index = order.index(node)
            rest = np.array(order[:index] + order[index + 1 :])
            after = np.roll(rest, -1)
            added_s = link_s[rest, node] + link_s[node, after] - link_s[rest, after]
            now_s = link_s[order[index - 1], node] + link_s[node, order[(index + 1) % len(order)]]
            now_s -= link_s[order[index - 1], order[(index + 1) % len(order)]]
            best = int(added_s.argmin())
            if added_s[best] < now_s - 1e-12:
                order = [*rest[: best + 1].tolist(), node, *rest[best + 1 :].tolist()]
                moved = True
        if not moved:
            break
    return order


def _split(cluster: LargeProblem, order: list[int]) -> Layout | None:
    """Return the best of some splits over a round trip: started at its longest links, with several bottlenecks."""
    problem = cluster.problem
    back = cluster.link_s[np.roll(order, 1), order]
    best: Layout | None = None
    for start in np.argsort(-back, kind="stable")[:_STARTS]:
        turned = order[start:] + order[:start]
        chain = cluster.chain.for_nodes(turned)
        flight = chain.in_flight(len(turned))
        slowest_s, low = INF, 0.0
        for _ in range(_SPLITS if flight > 1 else 1):
            cuts = cheapest_cuts(chain, chain.reach(slowest_s))
            layout = None if cuts is None else make_layout(problem, turned, cuts, cluster.chain)
            if layout is not None and meets_constraints(problem, layout) and layout.cost_s < _cost(best):
                best = layout
            if layout is None or layout.bottleneck_s * flight <= layout.latency_s:
                low = slowest_s  # a tighter bottleneck would only make a token slower
            if layout is None and slowest_s == INF:
                break
            high = min(INF if best is None else best.bottleneck_s, INF if layout is None else layout.bottleneck_s)
            slowest_s = (min(low, high) + high) / 2 * (1 - 1e-9)
    return best
