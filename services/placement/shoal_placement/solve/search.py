"""The search over orders and runs of layers: stage by stage, whatever cannot beat the best known is left out.

A way is: the set it is to use, its first and its last node, which of the set are left, the node it has come to, and
the layer it has come to. Of two ways that agree in all of these the dearer one is dropped (what follows costs the
same for both), and so is a way whose cost so far and, at least, to the end (bounds.py) is no less than the cost to be
beaten. If nothing else was dropped for lack of width, there is no better layout than the best one found.

The bottleneck is a limit on each stage, not a part of the cost: to beat a cost t, every stage has to be below t / C.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from shoal_placement.solve.bounds import CLOSE, Bounds, Limits
from shoal_placement.solve.cost import Floats, Ints
from shoal_placement.solve.subsets import sizes

_ROWS_AT_ONCE = 1 << 12
"""So many ways are lengthened in one go: it bounds memory, and how long numpy keeps other threads waiting."""
_SETS_PER_WIDTH = 2
_LOOKED_AT_PER_WIDTH = 64
_ALIKE = 4
EXACT_LINKS = 11
"""Nodes for which that takes little time anyway."""
INF = float("inf")


class Found(msgspec.Struct):
    """The best layout over so many nodes."""

    cost_s: float
    order: list[int]
    cuts: list[int]


class Ways(msgspec.Struct):
    """Ways in columns, one row each."""

    task: Ints
    rest: Ints
    node: Ints
    layer: Ints
    own_s: Floats
    """Stages and prices so far."""
    links_s: Floats
    slowest_s: Floats
    fetch: Ints
    parent: Ints
    """The row before, at one node less."""
    bound_s: Floats

    def pick(self, rows: Ints) -> Ways:
        """These rows."""
        return Ways(*(getattr(self, f)[rows] for f in self.__struct_fields__))


class Tasks(msgspec.Struct):
    """Sets with a first and a last node each, in columns; `row` says how many nodes they have."""

    row: Ints
    sets: Ints
    first: Ints
    last: Ints
    bound_s: Floats


class Search:
    """Searches for layouts over each number of nodes in `counts`, two at least, at the same time."""

    def __init__(self, bounds: Bounds, counts: Sequence[int]) -> None:
        self.bounds, self.chain, self.counts = bounds, bounds.chain, list(counts)
        self.flight = np.array([bounds.chain.in_flight(k) for k in counts], dtype=float)
        self.best = [Found(INF, [], []) for _ in counts]
        self.work_count = 0
        self.exactly = bounds.count <= EXACT_LINKS
        """Whether links are bounded as well as they can be: `Bounds.links_to`."""
        self._alike = _alike(bounds)
        fixed = sum(1 << int(i) for i in np.flatnonzero(self.chain.fixed))
        everything = np.arange(1 << bounds.count)
        usable = (bounds.start == 0) & (everything & fixed == fixed)
        for node, before in enumerate(self._alike):
            if before >= 0:
                usable &= ((everything >> node) & 1 == 0) | ((everything >> before) & 1 == 1)
        usable &= _each_has_a_layer(bounds)
        size = sizes(bounds.count)
        self.sets = [everything[usable & (size == k)] for k in counts]
        self.known = [np.zeros(len(s)) for s in self.sets]
        """The sets of each count that can hold the layers, and a cost that none of their layouts is below."""

    def limits(self, below_s: Floats) -> Limits:
        """What a stage may take in a layout that costs less than this."""
        most = np.where(self.flight > 1, below_s / self.flight * (1 - CLOSE), INF)
        return Limits(self.chain, [float(m) for m in most])

    def lower_bounds(self, rounds: int) -> Floats:
        """For each count a cost that no layout is below. Whatever t is tried, nothing costs less than both t and the
        least T of those whose stages are below t / C."""
        free = self.limits(np.full(len(self.counts), INF))
        self.known = [self.bounds.of_sets(s, free, row) for row, s in enumerate(self.sets)]
        low = np.array([v.min(initial=INF) for v in self.known])
        tried = [row for row in range(len(self.counts)) if self.flight[row] > 1 and low[row] < INF]
        if not tried:
            return low
        # Between T without a limit, and that of its stages in one place, C times.
        high = low * np.maximum(self.flight, 1)
        for _ in range(rounds):
            middle = np.where(high > low, np.sqrt(low * high), low)
            limits = self.limits(middle)
            for row in tried:
                below = np.flatnonzero(self.known[row] < middle[row])
                values = self.bounds.of_sets(self.sets[row][below], limits, row)
                self.known[row][below] = np.maximum(self.known[row][below], np.minimum(values, middle[row]))
                if values.min(initial=INF) >= middle[row]:
                    low[row] = middle[row]
                else:
                    high[row] = middle[row]
        return low

    def sweep(self, below_s: Floats, width: int) -> Floats:
        """Look for layouts that cost less than this, by count, keeping `width` ways of each count at each stage.

        Returns the least bound of what was dropped for lack of width: infinite where nothing was.
        """
        limits = self.limits(below_s)
        dropped = np.full(len(self.counts), INF)
        tasks = self._tasks(below_s, limits, width, dropped)
        if len(tasks.row) == 0:
            return dropped
        ways, levels = self._begin(tasks, below_s, limits, width, dropped), []
        while len(ways.task):
            levels.append(ways)
            ways = self._lengthen(ways, tasks, below_s, limits, width, dropped)
            done = np.flatnonzero(ways.rest == 0)
            if len(done):
                self._take(ways, done, tasks, levels)
                ways = ways.pick(np.flatnonzero(ways.rest != 0))
        return dropped

    # Which sets, and which ends

    def _tasks(self, below_s: Floats, limits: Limits, width: int, dropped: Floats) -> Tasks:
        found: list[Tasks] = []
        for row, sets in enumerate(self.sets):
            if not len(sets) or below_s[row] <= 0:
                continue
            here = np.flatnonzero(self.known[row] < below_s[row] * (1 - CLOSE))
            if len(here) > width * _LOOKED_AT_PER_WIDTH:
                ranked = here[np.argsort(self.known[row][here], kind="stable")]
                here = ranked[: width * _LOOKED_AT_PER_WIDTH]
                dropped[row] = self.known[row][ranked[len(here)]]
            least = self.bounds.of_sets(sets[here], limits, row)
            self.known[row][here] = np.maximum(self.known[row][here], np.minimum(least, below_s[row]))
            ranked = np.argsort(least, kind="stable")
            ranked = ranked[least[ranked] < below_s[row] * (1 - CLOSE)]
            good, least = here[ranked], least[ranked]
            most = max(width * _SETS_PER_WIDTH, 8)
            if len(good) > most:
                dropped[row] = min(dropped[row], least[most])
            found.append(self._with_ends(sets[good[:most]], row, below_s, limits, width, dropped))
        if not found:
            none = np.zeros(0, dtype=np.int64)
            return Tasks(none, none, none, none, np.zeros(0))
        return Tasks(*(np.concatenate([getattr(t, f) for t in found]) for f in Tasks.__struct_fields__))

    def _with_ends(self, sets: Ints, row: int, below_s: Floats, limits: Limits, width: int, dropped: Floats) -> Tasks:
        places = self.bounds.places
        has = (sets[:, None] >> places) & 1 == 1
        begins, ends = has.copy(), has.copy()
        for node, before in enumerate(self._alike):
            if before >= 0:  # of nodes that are alike the first in number comes first, and the last last
                begins[:, node] = False
                ends[:, before] &= ~has[:, node]
        which, first, last = np.nonzero(begins[:, :, None] & ends[:, None, :] & ~np.eye(len(places), dtype=bool))
        rows = np.full(len(which), row)
        bound_s = np.concatenate(
            [
                self.bounds.of_rest(
                    sets[which[c]], np.zeros(len(which[c]), dtype=np.int64), last[c], first[c], limits, rows[c]
                )
                for c in _pieces(len(which))
            ]
            or [np.zeros(0)]
        )
        if self.exactly:
            way = self.bounds.links_to(first, sets[which] & ~(1 << first), last, True)
            bound_s += way + self.bounds.link_s[last, first]
        else:
            bound_s += self.bounds.trips[sets[which]]
        good = np.flatnonzero(bound_s < below_s[row] * (1 - CLOSE))
        good = good[np.argsort(bound_s[good], kind="stable")]
        if len(good) > width:
            dropped[row] = min(dropped[row], bound_s[good[width]])
            good = good[:width]
        return Tasks(rows[good], sets[which[good]], first[good], last[good], bound_s[good])

    # Stage by stage

    def _begin(self, tasks: Tasks, below_s: Floats, limits: Limits, width: int, dropped: Floats) -> Ways:
        count = len(tasks.row)
        nothing, none = np.zeros(count), np.zeros(count, dtype=np.int64)
        before = Ways(np.arange(count), tasks.sets, tasks.first, none, nothing, nothing, nothing, none, none, nothing)
        return self._stages(before, np.arange(count), tasks.first, tasks, below_s, limits, width, dropped)

    def _lengthen(
        self, ways: Ways, tasks: Tasks, below_s: Floats, limits: Limits, width: int, dropped: Floats
    ) -> Ways:
        left = (ways.rest[:, None] >> self.bounds.places) & 1 == 1
        last = tasks.last[ways.task]
        only = ways.rest == 1 << last
        left[np.arange(len(last)), last] = only
        for place, before in enumerate(self._alike):
            if before >= 0:
                left[:, place] &= (ways.rest >> before) & 1 == 0
        rows, node = np.nonzero(left)
        return self._stages(ways, rows, node, tasks, below_s, limits, width, dropped)

    def _stages(
        self,
        ways: Ways,
        rows: Ints,
        node: Ints,
        tasks: Tasks,
        below_s: Floats,
        limits: Limits,
        width: int,
        dropped: Floats,
    ) -> Ways:
        """Each way of these rows with one stage more, on that node, of every length that leaves a chance."""
        rest = ways.rest[rows] & ~(1 << node)
        first = ways.layer[rows]
        to = np.minimum(
            limits.reach[tasks.row[ways.task[rows]], node, first],
            self.chain.layers - sizes(self.bounds.count)[rest],
        )
        least = np.maximum(first + np.maximum(self.chain.fixed[node], 1), self.bounds.start[rest])
        lengths = np.maximum(to - least + 1, 0)
        found: list[Ways] = []
        ends = np.cumsum(lengths)
        at = 0
        while at < len(rows):
            # As many rows as give a piece of work; one at least.
            base = ends[at - 1] if at else 0
            until = max(int(np.searchsorted(ends, base + _ROWS_AT_ONCE, side="right")), at + 1)
            piece = np.arange(at, until)
            each = np.repeat(piece, lengths[piece])
            layer = (
                least[each] + np.arange(len(each)) - np.repeat(ends[piece] - lengths[piece] - base, lengths[piece])
            )
            found.append(self._judged(ways, rows[each], node[each], rest[each], layer, tasks, below_s, limits))
            at = until
        if not found:
            return ways.pick(np.zeros(0, dtype=np.int64))
        together = Ways(*(np.concatenate([getattr(w, f) for w in found]) for f in Ways.__struct_fields__))
        # What is far too many is not worth comparing.
        few = self._narrowed(together, tasks, _ALIKE * width, dropped)
        return self._narrowed(self._distinct(few), tasks, width, dropped)

    def _judged(
        self,
        ways: Ways,
        rows: Ints,
        node: Ints,
        rest: Ints,
        layer: Ints,
        tasks: Tasks,
        below_s: Floats,
        limits: Limits,
    ) -> Ways:
        self.work_count += len(rows)
        chain, link_s, trips = self.chain, self.bounds.link_s, self.bounds.trips
        task, before = ways.task[rows], ways.layer[rows]
        count_row, last, first = tasks.row[task], tasks.last[task], tasks.first[task]
        own_s = ways.own_s[rows] + chain.cost[node, layer] - chain.cost[node, before]
        slowest = np.maximum(ways.slowest_s[rows], chain.s_per_work[node] * (chain.work[layer] - chain.work[before]))
        fetch = ways.fetch[rows] + chain.fetch[node, layer] - chain.fetch[node, before]
        links = ways.links_s[rows] + link_s[ways.node[rows], node]
        on = np.zeros(len(rest))
        ahead_of = np.flatnonzero(rest > 0)
        on[ahead_of] = self.bounds.links_to(node[ahead_of], rest[ahead_of], last[ahead_of], self.exactly)
        ahead = np.maximum(links + on + link_s[last, first], trips[tasks.sets[task]])
        bound = own_s + ahead + self.bounds.of_rest(rest, layer, last, None, limits, count_row)
        good = bound < below_s[count_row] * (1 - CLOSE)
        if chain.problem.max_fetch_bytes is not None:
            good &= fetch <= chain.problem.max_fetch_bytes
        kept = np.flatnonzero(good)
        every = Ways(task, rest, node, layer, own_s, links, slowest, fetch, rows, bound)
        return every.pick(kept)

    def _distinct(self, ways: Ways) -> Ways:
        """Of ways that agree in all that what follows depends on, the cheapest; with a budget of bytes to fetch, all
        that fetch less than every cheaper one."""
        key = ways.task << 16 | ways.rest
        key = key << 4 | ways.node
        key = key << 12 | ways.layer
        ranked = np.lexsort((ways.fetch, ways.own_s + ways.links_s, key))
        key = key[ranked]
        new = np.ones(len(key), dtype=bool)
        new[1:] = key[1:] != key[:-1]
        if self.chain.problem.max_fetch_bytes is None:
            return ways.pick(ranked[new])
        # Ranks that fall from group to group make one running minimum do for all groups.
        fetch = np.unique(ways.fetch[ranked], return_inverse=True)[1] - np.cumsum(new) * (len(key) + 1)
        before = np.minimum.accumulate(fetch)
        new[1:] |= fetch[1:] < before[:-1]
        return ways.pick(ranked[new])

    def _narrowed(self, ways: Ways, tasks: Tasks, width: int, dropped: Floats) -> Ways:
        """At most `width` ways of each count: those with the least bounds."""
        if len(ways.task) <= width:
            return ways
        count_row = tasks.row[ways.task]
        kept: list[Ints] = []
        for row in np.unique(count_row):
            here = np.flatnonzero(count_row == row)
            if len(here) > width:
                bounds = ways.bound_s[here]
                ranked = np.argpartition(bounds, width)
                dropped[row] = min(dropped[row], bounds[ranked[width]])
                here = here[ranked[:width]]
            kept.append(here)
        return ways.pick(np.sort(np.concatenate(kept)))

    # Ways that have come to their end

    def _take(self, ways: Ways, done: Ints, tasks: Tasks, levels: list[Ways]) -> None:
        task = ways.task[done]
        back = self.bounds.link_s[tasks.last[task], tasks.first[task]]
        row = tasks.row[task]
        cost = np.maximum(ways.own_s[done] + ways.links_s[done] + back, self.flight[row] * ways.slowest_s[done])
        for way in np.lexsort((cost, row)):
            if cost[way] < self.best[row[way]].cost_s:
                order, cuts = [int(ways.node[done[way]])], [self.chain.layers]
                at = int(ways.parent[done[way]])
                for level in reversed(levels):
                    order.append(int(level.node[at]))
                    cuts.append(int(level.layer[at]))
                    at = int(level.parent[at])
                self.best[row[way]] = Found(float(cost[way]), order[::-1], [0, *cuts[::-1]])


def _each_has_a_layer(bounds: Bounds) -> NDArray[np.bool_]:
    """For each subset whether each of its nodes could have a layer of its own, as far as memory goes.

    What a smaller node can hold a larger one can too, so it is enough that among those that can hold at most c
    layers, each by itself, there are at most c (Hall).
    """
    layers = np.sort(np.diff(bounds.chain.bytes))
    room = bounds.chain.free - bounds.chain.problem.stage_bytes
    can_hold = np.searchsorted(layers, room, side="right")
    size = sizes(bounds.count)
    subsets = np.arange(1 << bounds.count)
    found = np.ones(len(subsets), dtype=bool)
    for most in np.unique(can_hold[can_hold < bounds.count]):
        among = int(sum(1 << int(i) for i in np.flatnonzero(can_hold <= most)))
        found &= size[subsets & among] <= most
    return found


def _pieces(count: int) -> list[slice]:
    return [slice(at, at + _ROWS_AT_ONCE) for at in range(0, count, _ROWS_AT_ONCE)]


def _alike(bounds: Bounds) -> list[int]:
    """For each node the one before it that it could change places with; -1 where there is none."""
    chain, link_s, count = bounds.chain, bounds.link_s, bounds.count
    found = [-1] * count
    for b in range(count):
        for a in range(b - 1, -1, -1):
            others = [i for i in range(count) if i not in (a, b)]
            if (
                chain.free[a] == chain.free[b]
                and chain.fixed[a] == chain.fixed[b]
                and chain.s_per_work[a] == chain.s_per_work[b]
                and link_s[a, b] == link_s[b, a]
                and np.array_equal(chain.cost[a], chain.cost[b])
                and np.array_equal(chain.fetch[a], chain.fetch[b])
                and np.array_equal(link_s[a, others], link_s[b, others])
                and np.array_equal(link_s[others, a], link_s[others, b])
            ):
                found[b] = a
                break
    return found
