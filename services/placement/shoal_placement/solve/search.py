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

from shoal_placement.solve.bounds import ROWS_AT_ONCE, Bounds, Limits, pieces
from shoal_placement.solve.cost import Floats, Ints
from shoal_placement.solve.pour import CLOSE
from shoal_placement.solve.subsets import sizes

_SETS_PER_WIDTH = 2
_LOOKED_AT_PER_WIDTH = 64
_SETS_AT_ONCE = 512
"""Sets of all counts whose ends are looked at in one go."""
_ALIKE = 4
EXACT_LINKS = 11
"""Nodes for which that takes little time anyway."""
INF = float("inf")
_NONE: Ints = np.zeros(0, dtype=np.int64)
_LIKELY = 256
"""Sets of a count that its lower bound is sought with."""
_ROUNDS = 5
_STEP = 1.05
"""So much dearer is tried for a lower bound: more after each success, less after each failure."""


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

    def pick(self, rows: Ints) -> Ways:
        """These rows."""
        return Ways(*(getattr(self, f)[rows] for f in self.__struct_fields__))


class Tasks(msgspec.Struct):
    """Sets with a first and a last node each, in columns; `row` says how many nodes they have."""

    row: Ints
    sets: Ints
    first: Ints
    last: Ints


class _Sweep:
    """What is looked for, how wide, and the least bound of what was dropped; all by count."""

    def __init__(self, bounds: Bounds, below_s: Floats, width: int, limits: Limits) -> None:
        self.below_s, self.width, self.limits = below_s, width, limits
        self.rests = bounds.rests(limits)
        self.dropped: Floats = np.full(len(below_s), INF)


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
        return Limits(self.chain, np.where(self.flight > 1, below_s / self.flight * (1 - CLOSE), INF))

    def lower_bounds(self) -> Floats:
        """For each count a cost that no layout is below. Whatever t is tried, nothing costs less than both t and the
        least T of those whose stages are below t / C."""
        free = Limits(self.chain, np.array([INF]))
        token_s, share_s = self.bounds.of_every_set(free), self.bounds.shares()
        self.known = [
            token_s[s] if c <= 1 else np.maximum(token_s[s], share_s[s] * c)
            for s, c in zip(self.sets, self.flight, strict=True)
        ]
        low = np.array([v.min(initial=INF) for v in self.known])
        closer = (self.flight > 1) & (low < INF)
        if not closer.any():
            return low
        # With the most promising sets only, as far as that goes; then with all that this leaves.
        likely = [_least(v, _LIKELY) if c else _NONE for v, c in zip(self.known, closer, strict=True)]
        step, high = np.full(len(low), _STEP), np.full(len(low), INF)
        for _ in range(_ROUNDS):
            middle = np.where(high < INF, np.sqrt(low * high), low * step)
            least = self._known_at(middle, likely)
            reached = least >= middle
            step = np.where(reached, step * step, step)
            high = np.where(reached, high, middle)
            low = np.where(closer, np.maximum(low, np.minimum(middle, least)), low)
        rows = zip(self.known, low, closer, strict=True)
        self._known_at(low, [np.flatnonzero(known < least) if c else _NONE for known, least, c in rows])
        return np.array([v.min(initial=INF) for v in self.known])

    def _known_at(self, below_s: Floats, which: Sequence[Ints]) -> Floats:
        """Bound these sets of each count, as far as `below_s`. Returns the least T by count."""
        values = self._of_sets(self.limits(below_s), which)
        least = np.full(len(which), INF)
        for row, (own, found) in enumerate(zip(which, values, strict=True)):
            if len(own):
                least[row] = found.min()
                self.known[row][own] = np.maximum(self.known[row][own], np.minimum(found, below_s[row]))
        return least

    def _of_sets(self, limits: Limits, which: Sequence[Ints]) -> list[Floats]:
        lengths = [len(w) for w in which]
        sets = np.concatenate([s[w] for s, w in zip(self.sets, which, strict=True)])
        values = self.bounds.of_sets(sets, np.repeat(np.arange(len(which)), lengths), limits)
        return np.split(values, np.cumsum(lengths)[:-1])

    def sweep(self, below_s: Floats, width: int) -> Floats:
        """Look for layouts that cost less than this, by count, keeping `width` ways of each count at each stage.

        Returns the least bound of what was dropped for lack of width: infinite where nothing was.
        """
        sweep = _Sweep(self.bounds, below_s, width, self.limits(below_s))
        tasks = self._tasks(sweep)
        if len(tasks.row) == 0:
            return sweep.dropped
        ways, levels = self._begin(tasks, sweep), []
        while len(ways.task):
            levels.append(ways)
            ways = self._lengthen(ways, tasks, sweep)
            done = np.flatnonzero(ways.rest == 0)
            if len(done):
                self._take(ways, done, tasks, levels)
                ways = ways.pick(np.flatnonzero(ways.rest != 0))
        return sweep.dropped

    # Which sets, and which ends

    def _tasks(self, sweep: _Sweep) -> Tasks:
        below_s, width = sweep.below_s, sweep.width
        which = []
        for row, known in enumerate(self.known):
            here = np.flatnonzero(known < below_s[row] * (1 - CLOSE))
            most = width * _LOOKED_AT_PER_WIDTH
            if len(here) > most:
                nearest = _least(known[here], most + 1)
                sweep.dropped[row] = known[here[nearest[most]]]
                here = here[nearest[:most]]
            which.append(here)
        rows = np.repeat(np.arange(len(which)), [len(w) for w in which])
        if not len(rows):
            return Tasks(_NONE, _NONE, _NONE, _NONE)
        values = self._of_sets(sweep.limits, which)
        for row, (own, value) in enumerate(zip(which, values, strict=True)):
            self.known[row][own] = np.maximum(self.known[row][own], np.minimum(value, below_s[row]))
        sets = np.concatenate([s[w] for s, w in zip(self.sets, which, strict=True)])
        least = np.concatenate(values)
        good = np.flatnonzero(least < below_s[rows] * (1 - CLOSE))
        good = good[_narrowed(rows[good], least[good], max(width * _SETS_PER_WIDTH, 8), sweep.dropped)]
        sets, rows = sets[good], rows[good]
        # A wide search has so many pairs of ends that each count has to do by itself.
        counts = [slice(None)] if len(sets) <= _SETS_AT_ONCE else [rows == row for row in np.unique(rows)]
        found = [self._with_ends(sets[own], rows[own], sweep) for own in counts]
        return Tasks(*(np.concatenate([getattr(t, f) for t in found]) for f in Tasks.__struct_fields__))

    def _with_ends(self, sets: Ints, rows: Ints, sweep: _Sweep) -> Tasks:
        places, bounds = self.bounds.places, self.bounds
        has = (sets[:, None] >> places) & 1 == 1
        begins, ends = has.copy(), has.copy()
        for node, before in enumerate(self._alike):
            if before >= 0:  # of nodes that are alike the first in number comes first, and the last last
                begins[:, node] = False
                ends[:, before] &= ~has[:, node]
        which, first, last = np.nonzero(begins[:, :, None] & ends[:, None, :] & ~np.eye(len(places), dtype=bool))
        sets, rows = sets[which], rows[which]
        if self.exactly:
            bound_s = bounds.links_to(first, sets & ~(1 << first), last, True) + bounds.link_s[last, first]
        else:
            bound_s = bounds.trips[sets]
        for c in pieces(len(which)):
            sums = sweep.rests.sums(sets[c], last[c], first[c], rows[c])
            bound_s[c] += sweep.rests.costs(sums, np.zeros(sums.shape[1], dtype=np.int64))
            bound_s[c] += sweep.rests.beside(sets[c], last[c], first[c])
        good = np.flatnonzero(bound_s < sweep.below_s[rows] * (1 - CLOSE))
        good = good[_narrowed(rows[good], bound_s[good], sweep.width, sweep.dropped)]
        return Tasks(rows[good], sets[good], first[good], last[good])

    # Stage by stage

    def _begin(self, tasks: Tasks, sweep: _Sweep) -> Ways:
        count = len(tasks.row)
        nothing, none = np.zeros(count), np.zeros(count, dtype=np.int64)
        before = Ways(np.arange(count), tasks.sets, tasks.first, none, nothing, nothing, nothing, none, none)
        return self._stages(before, np.arange(count), tasks.first, tasks, sweep)

    def _lengthen(self, ways: Ways, tasks: Tasks, sweep: _Sweep) -> Ways:
        left = (ways.rest[:, None] >> self.bounds.places) & 1 == 1
        last = tasks.last[ways.task]
        only = ways.rest == 1 << last
        left[np.arange(len(last)), last] = only
        for place, before in enumerate(self._alike):
            if before >= 0:
                left[:, place] &= (ways.rest >> before) & 1 == 0
        rows, node = np.nonzero(left)
        return self._stages(ways, rows, node, tasks, sweep)

    def _stages(self, ways: Ways, rows: Ints, node: Ints, tasks: Tasks, sweep: _Sweep) -> Ways:
        """Each way of these rows with one stage more, on that node, of every length that leaves a chance."""
        chain, bounds = self.chain, self.bounds
        before, task = ways.layer[rows], ways.task[rows]
        rest = ways.rest[rows] & ~(1 << node)
        row, last, first = tasks.row[task], tasks.last[task], tasks.first[task]
        to = np.minimum(sweep.limits.reach[row, node, before], chain.layers - sizes(bounds.count)[rest])
        least = np.maximum(before + np.maximum(chain.fixed[node], 1), bounds.start[rest])
        lengths = np.maximum(to - least + 1, 0)
        self.work_count += int(lengths.sum())
        # What is the same for every length.
        links = ways.links_s[rows] + bounds.link_s[ways.node[rows], node]
        on = bounds.links_to(node, rest, last, self.exactly)
        ahead = np.maximum(links + on + bounds.link_s[last, first], bounds.trips[tasks.sets[task]])
        ahead += sweep.rests.beside(rest, last, None)
        own = ways.own_s[rows] - chain.cost[node, before]
        below = sweep.below_s[row] * (1 - CLOSE)
        found: list[tuple[Ints, Ints, Floats, Floats]] = []
        ends = np.cumsum(lengths)
        at = 0
        while at < len(rows):
            # As many rows as give a piece of work; one at least.
            base = ends[at - 1] if at else 0
            until = max(int(np.searchsorted(ends, base + ROWS_AT_ONCE, side="right")), at + 1)
            piece = np.arange(at, until)
            each = np.repeat(piece, lengths[piece])
            layer = np.arange(len(each)) - (ends[piece] - lengths[piece] - base - least[piece])[each - at]
            sums = sweep.rests.sums(rest[piece], last[piece], None, row[piece])
            own_s = own[each] + chain.cost[node[each], layer]
            bound = own_s + ahead[each] + sweep.rests.costs(sums.take(each - at, axis=1), layer)
            kept = np.flatnonzero(bound < below[each])
            found.append((each[kept], layer[kept], own_s[kept], bound[kept]))
            at = until
        if not found:
            return ways.pick(_NONE)
        each, layer, own_s, bound = (np.concatenate(column) for column in zip(*found, strict=True))
        if chain.problem.max_fetch_bytes is not None:
            fetch = ways.fetch[rows[each]] + chain.fetch[node[each], layer] - chain.fetch[node[each], before[each]]
            kept = np.flatnonzero(fetch <= chain.problem.max_fetch_bytes)
            each, layer, own_s, bound = each[kept], layer[kept], own_s[kept], bound[kept]
        # What is far too many is not worth comparing.
        few = _narrowed(row[each], bound, _ALIKE * sweep.width, sweep.dropped)
        each, layer, own_s, bound = each[few], layer[few], own_s[few], bound[few]
        on_node, parent, links_s = node[each], rows[each], links[each]
        fetch = ways.fetch[parent] + chain.fetch[on_node, layer] - chain.fetch[on_node, before[each]]
        key = task[each] << 16 | rest[each]
        key = (key << 4 | on_node) << 12 | layer
        kept = self._distinct(key, own_s + links_s, fetch)
        kept = kept[_narrowed(row[each[kept]], bound[kept], sweep.width, sweep.dropped)]
        each, layer, on_node, parent = each[kept], layer[kept], on_node[kept], parent[kept]
        stage_s = chain.s_per_work[on_node] * (chain.work[layer] - chain.work[before[each]])
        return Ways(
            task[each],
            rest[each],
            on_node,
            layer,
            own_s[kept],
            links_s[kept],
            np.maximum(ways.slowest_s[parent], stage_s),
            fetch[kept],
            parent,
        )

    def _distinct(self, key: Ints, cost_s: Floats, fetch: Ints) -> Ints:
        """Of ways that agree in all that what follows depends on, the cheapest; with a budget of bytes to fetch, all
        that fetch less than every cheaper one."""
        ranked = np.lexsort((fetch, cost_s, key))
        key = key[ranked]
        new = np.ones(len(key), dtype=bool)
        new[1:] = key[1:] != key[:-1]
        if self.chain.problem.max_fetch_bytes is not None:
            # Ranks that fall from group to group make one running minimum do for all groups.
            ranks = np.unique(fetch[ranked], return_inverse=True)[1] - np.cumsum(new) * (len(key) + 1)
            new[1:] |= ranks[1:] < np.minimum.accumulate(ranks)[:-1]
        return ranked[new]

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


def _narrowed(row: Ints, bound_s: Floats, width: int, dropped: Floats) -> Ints:
    """Which to keep: `width` of each row, those with the least bounds. `row` never falls."""
    if len(row) <= width:
        return np.arange(len(row))
    starts = row.searchsorted(np.arange(len(dropped) + 1))
    wide = (starts[1:] - starts[:-1] > width).nonzero()[0]
    if not len(wide):
        return np.arange(len(row))
    kept = np.ones(len(row), dtype=bool)
    for at in wide.tolist():
        here = slice(starts[at], starts[at + 1])
        bounds = bound_s[here]
        ranked = bounds.argpartition(width)
        dropped[at] = min(dropped[at], bounds[ranked[width]])
        kept[here][ranked[width:]] = False
    return kept.nonzero()[0]


def _least(values: Floats, count: int) -> Ints:
    """Where the least of these are; the last of them last."""
    if len(values) <= count:
        return np.arange(len(values))
    return np.argpartition(values, count - 1)[:count]


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
