"""More nodes than all subsets of can be looked at: the exact search within neighbourhoods, and a bound for all.

A neighbourhood is the nodes that would do the most for a layout around one of them, its seed: fast ones with short
links to it. Neighbourhoods are searched in the order of what they cost at least, until none can be better. Layouts
over more nodes than a neighbourhood has are built one by one: nodes by speed and room, an order by the shortest
link next and then by moving nodes, and the cheapest split over it. Not proved to be best; the bound says how far off
one can be.

The bound: a node that takes part costs half its shortest link in and half its shortest out; spread over the work it
can take, that is a price on each unit, and the work is poured into the cheapest nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import msgspec
import numpy as np

from shoal_placement.solve import exact
from shoal_placement.solve.bounds import FIRST, INNER, LAST, Limits
from shoal_placement.solve.cost import Chain, Floats, Ints, keeps, layout_of
from shoal_placement.solve.even import cheapest_cuts
from shoal_placement.solve.exact import links, one_node
from shoal_placement.solve.problem import Answer, Layout, Problem
from shoal_placement.solve.search import INF
from shoal_placement.solve.subsets import MOST

NEIGHBOURS = 12
_SEARCHES = 8
_PREVIEW_SEARCHES = 3
_PACE = exact.Pace(effort=60_000)
_ROUNDS = 12
_STARTS = 2
_SEEDS_AT_ONCE = 32
_SPLITS = 4
"""Bottlenecks that are tried for a way round."""


class Cluster:
    """A problem with many nodes, and what each of its nodes could do."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.chain = Chain(problem, problem.nodes)
        self.link_s = links(problem)
        self.count = len(problem.nodes)
        by_layer = np.diff(self.chain.cost, axis=1) / np.diff(self.chain.work)
        self.rate: Floats = by_layer.min(axis=1)
        np.fill_diagonal(self.link_s, INF)
        self.links_of: Floats = (self.link_s.min(axis=0) + self.link_s.min(axis=1)) / 2
        np.fill_diagonal(self.link_s, 0.0)
        self.fixed = [int(i) for i in np.flatnonzero(self.chain.fixed)]

    def most_work(self, slowest_s: float) -> Floats:
        """What each node can take within a bottleneck."""
        most = Limits(self.chain, np.array([slowest_s])).most[:, :, 0]
        largest: Floats = np.maximum(np.maximum(most[INNER], most[FIRST]), most[LAST])
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
        most = self.most_work(slowest_s)
        usable = most > 0
        rate = np.where(usable, self.rate + self.links_of / np.where(usable, most, 1.0), INF)
        return float(poured(rate[None, :], most[None, :], float(self.chain.work[-1]))[0])

    def part(self, places: Sequence[int]) -> Problem:
        """The problem with these nodes only."""
        nodes = [self.problem.nodes[i] for i in places]
        return msgspec.structs.replace(self.problem, nodes=nodes, link_s=self.link_s[np.ix_(places, places)].tolist())


def poured(rate: Floats, most: Floats, work: float) -> Floats:
    """In each row: what the work costs when it is poured into the cheapest first; infinite when there is no room."""
    ranked = np.argsort(rate, axis=1, kind="stable")
    rate, most = np.take_along_axis(rate, ranked, axis=1), np.take_along_axis(most, ranked, axis=1)
    upto = np.minimum(np.cumsum(most, axis=1), work)
    taken = np.diff(upto, axis=1, prepend=0.0)
    cost: Floats = (np.where(taken > 0, rate, 0.0) * taken).sum(axis=1)
    return np.where(upto[:, -1] >= work * (1 - 1e-9), cost, INF)


def best(problem: Problem) -> Answer:
    """The best layout that was found over any number of nodes."""
    return _best(Cluster(problem), _PACE, _SEARCHES)


def _best(cluster: Cluster, pace: exact.Pace, searches: int) -> Answer:
    problem, lower = cluster.problem, cluster.lower_bound
    found: Layout | None = None
    if problem.min_nodes <= 1 <= problem.max_nodes:
        found = one_node(problem, cluster.chain).layout
        lower = min(lower, _cost(found))
    for pool, least in _neighbourhoods(cluster, NEIGHBOURS)[:searches]:
        if least >= _cost(found):
            break
        layout = exact.best(cluster.part(pool), pace, _cost(found)).layout
        if layout is not None and layout.cost_s < _cost(found):
            found = layout
    if found is None or len(found.slices) >= NEIGHBOURS:
        for layout in _stretched(cluster, range(max(problem.min_nodes, 2), _most(problem) + 1)).values():
            if layout.cost_s < _cost(found):
                found = layout
    return _answer(found, lower)


def best_for_each_count(problem: Problem) -> dict[int, Answer]:
    """The best layout that was found over exactly k nodes, for each k that is allowed."""
    cluster = Cluster(problem)
    found: dict[int, Layout] = {}
    pools = _neighbourhoods(cluster, MOST)
    for pool, _ in pools[:1] + [p for p in pools[1:2] if cluster.count > 4 * MOST]:
        for k, answer in exact.best_for_each_count(cluster.part(pool), exact.SHORT).items():
            if answer.layout is not None and answer.layout.cost_s < _cost(found.get(k)):
                found[k] = answer.layout
    over = _best(cluster, exact.SHORT, _PREVIEW_SEARCHES).layout
    if over is not None and over.cost_s < _cost(found.get(len(over.slices))):
        found[len(over.slices)] = over
    counts = range(max(problem.min_nodes, 2), _most(problem) + 1)
    found.update(_stretched(cluster, [k for k in counts if k not in found]))
    answers = {k: _answer(found.get(k), cluster.lower_bound) for k in counts}
    if problem.min_nodes <= 1 <= problem.max_nodes:
        answers[1] = one_node(problem, cluster.chain)
    return answers


def _most(problem: Problem) -> int:
    return min(problem.max_nodes, len(problem.nodes), len(problem.layer_bytes))


def _cost(layout: Layout | None) -> float:
    return INF if layout is None else layout.cost_s


def _answer(layout: Layout | None, lower: float) -> Answer:
    cost = _cost(layout)
    # That the work cannot be poured proves that nothing fits.
    return Answer(layout, min(lower, cost), proved=lower >= cost * (1 - 1e-9) if layout else lower == INF)


def _neighbourhoods(cluster: Cluster, size: int) -> list[tuple[list[int], float]]:
    """Sets of nodes to search in, with what a layout within each costs at least; the most promising first."""
    size = min(size, cluster.count)
    flight = cluster.chain.in_flight(min(size, NEIGHBOURS))
    slowest_s = 2 * cluster.lower_bound / flight if flight > 1 else INF
    most = cluster.most_work(slowest_s)
    usable = np.flatnonzero(most > 0)
    if len(usable) < 2:
        return []
    size = min(size, len(usable))
    # A few seeds at a time: a large table in one go would keep other threads waiting.
    pools: Ints = np.concatenate(
        [_around(cluster, usable[at : at + _SEEDS_AT_ONCE], usable, most, size) for at in _starts(len(usable))]
    )
    pools = np.unique(pools, axis=0)
    # Links no shorter than the shortest within the neighbourhood.
    links_of = np.concatenate(
        [_shortest_within(cluster, pools[at : at + _SEEDS_AT_ONCE]) for at in _starts(len(pools))]
    )
    rate = cluster.rate[pools] + links_of / most[pools]
    least = poured(rate, most[pools], float(cluster.chain.work[-1]))
    ranked = np.argsort(least, kind="stable")
    return [([int(i) for i in pools[row]], float(least[row])) for row in ranked if least[row] < INF]


def _starts(count: int) -> range:
    return range(0, count, _SEEDS_AT_ONCE)


def _around(cluster: Cluster, seeds: Ints, usable: Ints, most: Floats, size: int) -> Ints:
    """For each seed, the nodes that suit it best, itself among them."""
    to_seed = (cluster.link_s[seeds] + cluster.link_s[:, seeds].T)[:, usable] / 2
    score = cluster.rate[usable] + to_seed / most[usable]
    score[seeds[:, None] == usable] = -INF
    score[:, np.isin(usable, cluster.fixed)] = -INF
    nearest: Ints = usable[np.sort(np.argpartition(score, size - 1, axis=1)[:, :size], axis=1)]
    return nearest


def _shortest_within(cluster: Cluster, pools: Ints) -> Floats:
    within = cluster.link_s[pools[:, :, None], pools[:, None, :]]
    within = within + np.where(np.eye(pools.shape[1], dtype=bool), INF, 0.0)
    shortest: Floats = (within.min(axis=1) + within.min(axis=2)) / 2
    return shortest


# Layouts over more nodes than a neighbourhood has


def _stretched(cluster: Cluster, counts: Sequence[int]) -> dict[int, Layout]:
    """A good layout over exactly k nodes, for each of these k for which one is found."""
    found: dict[int, Layout] = {}
    for k in counts:
        nodes = _members(cluster, k)
        layout = None if nodes is None else _split(cluster, _round(cluster.link_s, nodes))
        if layout is not None:
            found[k] = layout
    return found


def _members(cluster: Cluster, count: int) -> list[int] | None:
    """So many nodes that have the room: the fastest that do, and more and more for their room."""
    most = cluster.most_work(INF)
    work = float(cluster.chain.work[-1])
    rate = cluster.rate + cluster.links_of / np.maximum(most, 1e-12)
    rate[cluster.fixed] = -INF
    spread = max(float(np.ptp(cluster.rate)), 1e-12) / max(float(most.max()), 1e-12)
    for weight in (0.0, 0.25, 1.0, 4.0, 64.0):
        chosen = np.argsort(rate - weight * spread * most, kind="stable")[:count]
        if most[chosen].min() > 0 and most[chosen].sum() >= work:
            return sorted(int(i) for i in chosen)
    return None


def _round(link_s: Floats, nodes: list[int]) -> list[int]:
    """A short way round: the nearest next, then each node moved where it is shorter, until none is."""
    left, order = set(nodes[1:]), [nodes[0]]
    while left:
        here = link_s[order[-1]]
        order.append(min(left, key=lambda n: (here[n], n)))
        left.remove(order[-1])
    for _ in range(3):
        moved = False
        for node in nodes:
            at = order.index(node)
            rest = np.array(order[:at] + order[at + 1 :])
            after = np.roll(rest, -1)
            longer = link_s[rest, node] + link_s[node, after] - link_s[rest, after]
            now = link_s[order[at - 1], node] + link_s[node, order[(at + 1) % len(order)]]
            now -= link_s[order[at - 1], order[(at + 1) % len(order)]]
            place = int(longer.argmin())
            if longer[place] < now - 1e-12:
                order = [*rest[: place + 1].tolist(), node, *rest[place + 1 :].tolist()]
                moved = True
        if not moved:
            break
    return order


def _split(cluster: Cluster, order: list[int]) -> Layout | None:
    """The best of some splits over a way round: begun at the longest links, with bottlenecks between bounds."""
    problem = cluster.problem
    back = cluster.link_s[np.roll(order, 1), order]
    best: Layout | None = None
    for start in np.argsort(-back, kind="stable")[:_STARTS]:
        turned = order[start:] + order[:start]
        chain = cluster.chain.part(turned)
        flight = chain.in_flight(len(turned))
        slowest_s, low = INF, 0.0
        for _ in range(_SPLITS if flight > 1 else 1):
            cuts = cheapest_cuts(chain, chain.reach(slowest_s))
            layout = None if cuts is None else layout_of(problem, turned, cuts, cluster.chain)
            if layout is not None and keeps(problem, layout) and layout.cost_s < _cost(best):
                best = layout
            if layout is None or layout.bottleneck_s * flight <= layout.latency_s:
                low = slowest_s  # a tighter one only makes a token slower
            if layout is None and slowest_s == INF:
                break
            high = min(INF if best is None else best.bottleneck_s, INF if layout is None else layout.bottleneck_s)
            slowest_s = (min(low, high) + high) / 2 * (1 - 1e-9)
    return best
