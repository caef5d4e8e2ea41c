"""The search over orders and ranges of layers: stage by stage, dropping whatever cannot beat the best known layout.

A partial layout is: the set of nodes it will use, its first and its last node, which of the set are left, the current
node, and the current layer. Of two that agree in all of these the dearer one is dropped, since what follows costs the
same for both. One is also dropped if its cost so far plus the bound of the rest (bounds.py) is no less than the cost
to beat. If none was dropped for lack of width, there is no better layout than the best one found.

The bottleneck is a limit on each stage, not a part of the cost: to beat a cost t, every stage has to be below t / C.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from shoal_placement.solver.bounds import (
    MAX_BATCH_ROWS,
    BoundContext,
    Bounds,
    can_each_hold_a_layer,
    chunks,
    interchangeable_nodes,
)
from shoal_placement.solver.cost import Floats, Ints
from shoal_placement.solver.fractional_knapsack import COST_TOLERANCE
from shoal_placement.solver.subsets import subset_sizes

_SETS_PER_WIDTH = 2
_BOUNDED_PER_WIDTH = 64
_SETS_PER_BATCH = 512
"""Up to this many sets, the pairs of ends of all numbers of nodes are handled in one batch."""
_CANDIDATES_PER_WIDTH = 4
MAX_NODES_EXACT_LINKS = 11
"""Up to this many nodes, exact bounds of links take little time."""
INF = float("inf")
_NONE: Ints = np.zeros(0, dtype=np.int64)
_LIKELY = 256
"""Sets of each number of nodes that a first lower bound is sought with."""
_ROUNDS = 5
_STEP = 1.05
"""First factor by which a higher lower bound is tried: larger after each success, smaller after each failure."""


class Incumbent(msgspec.Struct):
    """The best layout found over a number of nodes."""

    cost_s: float
    order: list[int]
    cuts: list[int]


class PartialLayouts(msgspec.Struct):
    """Partial layouts in columns, one row each."""

    task: Ints
    remaining: Ints
    node: Ints
    layer: Ints
    stages_s: Floats
    """Stages and prices so far."""
    links_s: Floats
    slowest_s: Floats
    fetch: Ints
    parent: Ints
    """The row of the partial layout with one stage less."""

    def select_rows(self, rows: Ints) -> PartialLayouts:
        """Return these rows."""
        return PartialLayouts(*(getattr(self, f)[rows] for f in self.__struct_fields__))


class SearchTasks(msgspec.Struct):
    """Sets with a first and a last node each, in columns; `row` is the index of their number of nodes."""

    row: Ints
    sets: Ints
    first: Ints
    last: Ints


class _Sweep:
    """The cost to beat, the width, and the least bound of what was dropped; by number of nodes."""

    def __init__(self, bounds: Bounds, below_s: Floats, width: int, context: BoundContext) -> None:
        self.below_s, self.width, self.context = below_s, width, context
        self.remainder_bounds = bounds.remainder_bounds(context)
        self.dropped: Floats = np.full(len(below_s), INF)


class BeamSearch:
    """Searches for layouts over each number of nodes in `counts`, at least two, at the same time."""

    def __init__(self, bounds: Bounds, counts: Sequence[int]) -> None:
        self.bounds, self.chain, self.counts = bounds, bounds.chain, list(counts)
        self.in_flight = np.array([bounds.chain.in_flight(k) for k in counts], dtype=float)
        self.best = [Incumbent(INF, [], []) for _ in counts]
        self.partial_layout_count = 0
        self.exact_links = bounds.count <= MAX_NODES_EXACT_LINKS
        """Whether the bounds of links are exact: `Bounds.links_to`."""
        self.interchangeable_nodes = interchangeable_nodes(bounds)
        fixed = sum(1 << int(i) for i in np.flatnonzero(self.chain.required_counts))
        everything = np.arange(1 << bounds.count)
        usable = (bounds.earliest_start == 0) & (everything & fixed == fixed)
        for node, before in enumerate(self.interchangeable_nodes):
            if before >= 0:
                usable &= ((everything >> node) & 1 == 0) | ((everything >> before) & 1 == 1)
        usable &= can_each_hold_a_layer(bounds)
        size = subset_sizes(bounds.count)
        self.sets = [everything[usable & (size == k)] for k in counts]
        self.bounds_by_set = [np.zeros(len(s)) for s in self.sets]
        """The sets of each count that can hold the layers, and a lower bound of the cost of each."""

    def context(self, below_s: Floats) -> BoundContext:
        """Return what a stage may take in a layout that costs less than this."""
        return BoundContext(
            self.chain, np.where(self.in_flight > 1, below_s / self.in_flight * (1 - COST_TOLERANCE), INF)
        )

    def lower_bounds(self) -> Floats:
        """Return a lower bound of the cost for each count.

        For any t, no layout costs less than both t and the least T of the layouts whose stages are below t / C.
        """
        free = BoundContext(self.chain, np.array([INF]))
        token_s, share_s = self.bounds.bounds_of_all_sets(free), self.bounds.bottleneck_bounds_s()
        self.bounds_by_set = [
            token_s[s] if c <= 1 else np.maximum(token_s[s], share_s[s] * c)
            for s, c in zip(self.sets, self.in_flight, strict=True)
        ]
        low = np.array([v.min(initial=INF) for v in self.bounds_by_set])
        closer = (self.in_flight > 1) & (low < INF)
        if not closer.any():
            return low
        # First with the most promising sets only, then with all that these leave.
        likely = [_least(v, _LIKELY) if c else _NONE for v, c in zip(self.bounds_by_set, closer, strict=True)]
        step, high = np.full(len(low), _STEP), np.full(len(low), INF)
        for _ in range(_ROUNDS):
            middle = np.where(high < INF, np.sqrt(low * high), low * step)
            least = self._known_at(middle, likely)
            reached = least >= middle
            step = np.where(reached, step * step, step)
            high = np.where(reached, high, middle)
            low = np.where(closer, np.maximum(low, np.minimum(middle, least)), low)
        rows = zip(self.bounds_by_set, low, closer, strict=True)
        self._known_at(low, [np.flatnonzero(known < least) if c else _NONE for known, least, c in rows])
        return np.array([v.min(initial=INF) for v in self.bounds_by_set])

    def _known_at(self, below_s: Floats, which: Sequence[Ints]) -> Floats:
        """Raise the bounds of these sets of each count, up to `below_s`. Return the least T by count."""
        values = self._of_sets(self.context(below_s), which)
        least = np.full(len(which), INF)
        for row, (chosen, bound_s) in enumerate(zip(which, values, strict=True)):
            if len(chosen):
                least[row] = bound_s.min()
                self.bounds_by_set[row][chosen] = np.maximum(
                    self.bounds_by_set[row][chosen], np.minimum(bound_s, below_s[row])
                )
        return least

    def _of_sets(self, context: BoundContext, which: Sequence[Ints]) -> list[Floats]:
        lengths = [len(w) for w in which]
        sets = np.concatenate([s[w] for s, w in zip(self.sets, which, strict=True)])
        values = self.bounds.bounds_of_sets(sets, np.repeat(np.arange(len(which)), lengths), context)
        return np.split(values, np.cumsum(lengths)[:-1])

    def sweep(self, below_s: Floats, width: int) -> Floats:
        """Search for layouts that cost less than this, by count, with at most `width` partial layouts at each stage.

        Return the least bound of what was dropped for lack of width; infinite where nothing was dropped.
        """
        sweep = _Sweep(self.bounds, below_s, width, self.context(below_s))
        tasks = self._tasks(sweep)
        if len(tasks.row) == 0:
            return sweep.dropped
        layouts, levels = self._begin(tasks, sweep), []
        while len(layouts.task):
            levels.append(layouts)
            layouts = self._extend(layouts, tasks, sweep)
            done = np.flatnonzero(layouts.remaining == 0)
            if len(done):
                self._select(layouts, done, tasks, levels)
                layouts = layouts.select_rows(np.flatnonzero(layouts.remaining != 0))
        return sweep.dropped

    # Which sets, and which first and last nodes

    def _tasks(self, sweep: _Sweep) -> SearchTasks:
        below_s, width = sweep.below_s, sweep.width
        which = []
        for row, known in enumerate(self.bounds_by_set):
            promising = np.flatnonzero(known < below_s[row] * (1 - COST_TOLERANCE))
            max_sets = width * _BOUNDED_PER_WIDTH
            if len(promising) > max_sets:
                nearest = _least(known[promising], max_sets + 1)
                sweep.dropped[row] = known[promising[nearest[max_sets]]]
                promising = promising[nearest[:max_sets]]
            which.append(promising)
        rows = np.repeat(np.arange(len(which)), [len(w) for w in which])
        if not len(rows):
            return SearchTasks(_NONE, _NONE, _NONE, _NONE)
        values = self._of_sets(sweep.context, which)
        for row, (chosen, value) in enumerate(zip(which, values, strict=True)):
            self.bounds_by_set[row][chosen] = np.maximum(
                self.bounds_by_set[row][chosen], np.minimum(value, below_s[row])
            )
        sets = np.concatenate([s[w] for s, w in zip(self.sets, which, strict=True)])
        least = np.concatenate(values)
        good = np.flatnonzero(least < below_s[rows] * (1 - COST_TOLERANCE))
        good = good[_narrowed(rows[good], least[good], max(width * _SETS_PER_WIDTH, 8), sweep.dropped)]
        sets, rows = sets[good], rows[good]
        # A wide search has so many pairs of ends that each count is handled by itself.
        batches = [slice(None)] if len(sets) <= _SETS_PER_BATCH else [rows == row for row in np.unique(rows)]
        tasks = [self._with_ends(sets[batch], rows[batch], sweep) for batch in batches]
        return SearchTasks(*(np.concatenate([getattr(t, f) for t in tasks]) for f in SearchTasks.__struct_fields__))

    def _with_ends(self, sets: Ints, rows: Ints, sweep: _Sweep) -> SearchTasks:
        places, bounds = self.bounds.node_indices, self.bounds
        has = (sets[:, None] >> places) & 1 == 1
        begins, ends = has.copy(), has.copy()
        for node, before in enumerate(self.interchangeable_nodes):
            if before >= 0:  # of interchangeable nodes the lowest comes first and the highest last
                begins[:, node] = False
                ends[:, before] &= ~has[:, node]
        which, first, last = np.nonzero(begins[:, :, None] & ends[:, None, :] & ~np.eye(len(places), dtype=bool))
        sets, rows = sets[which], rows[which]
        if self.exact_links:
            bound_s = bounds.links_to(first, sets & ~(1 << first), last, True) + bounds.link_s[last, first]
        else:
            bound_s = bounds.round_trips_s[sets]
        for c in chunks(len(which)):
            sums = sweep.remainder_bounds.sums(sets[c], last[c], first[c], rows[c])
            bound_s[c] += sweep.remainder_bounds.costs(sums, np.zeros(sums.shape[1], dtype=np.int64))
            bound_s[c] += sweep.remainder_bounds.end_costs(sets[c], last[c], first[c])
        good = np.flatnonzero(bound_s < sweep.below_s[rows] * (1 - COST_TOLERANCE))
        good = good[_narrowed(rows[good], bound_s[good], sweep.width, sweep.dropped)]
        return SearchTasks(rows[good], sets[good], first[good], last[good])

    # Stage by stage

    def _begin(self, tasks: SearchTasks, sweep: _Sweep) -> PartialLayouts:
        count = len(tasks.row)
        nothing, none = np.zeros(count), np.zeros(count, dtype=np.int64)
        before = PartialLayouts(
            np.arange(count), tasks.sets, tasks.first, none, nothing, nothing, nothing, none, none
        )
        return self._stages(before, np.arange(count), tasks.first, tasks, sweep)

    def _extend(self, layouts: PartialLayouts, tasks: SearchTasks, sweep: _Sweep) -> PartialLayouts:
        left = (layouts.remaining[:, None] >> self.bounds.node_indices) & 1 == 1
        last = tasks.last[layouts.task]
        only = layouts.remaining == 1 << last
        left[np.arange(len(last)), last] = only
        for place, before in enumerate(self.interchangeable_nodes):
            if before >= 0:
                left[:, place] &= (layouts.remaining >> before) & 1 == 0
        rows, node = np.nonzero(left)
        return self._stages(layouts, rows, node, tasks, sweep)

    def _stages(
        self, layouts: PartialLayouts, rows: Ints, node: Ints, tasks: SearchTasks, sweep: _Sweep
    ) -> PartialLayouts:
        """Extend each of these rows by a stage on that node, of every length that may still beat the best known."""
        chain, bounds = self.chain, self.bounds
        before, task = layouts.layer[rows], layouts.task[rows]
        rest = layouts.remaining[rows] & ~(1 << node)
        row, last, first = tasks.row[task], tasks.last[task], tasks.first[task]
        to = np.minimum(sweep.context.reach[row, node, before], chain.layer_count - subset_sizes(bounds.count)[rest])
        least = np.maximum(before + np.maximum(chain.required_counts[node], 1), bounds.earliest_start[rest])
        lengths = np.maximum(to - least + 1, 0)
        self.partial_layout_count += int(lengths.sum())
        # These are the same for every length.
        links = layouts.links_s[rows] + bounds.link_s[layouts.node[rows], node]
        links_left = bounds.links_to(node, rest, last, self.exact_links)
        ahead = np.maximum(links + links_left + bounds.link_s[last, first], bounds.round_trips_s[tasks.sets[task]])
        ahead += sweep.remainder_bounds.end_costs(rest, last, None)
        own = layouts.stages_s[rows] - chain.cost[node, before]
        below = sweep.below_s[row] * (1 - COST_TOLERANCE)
        batches: list[tuple[Ints, Ints, Floats, Floats]] = []
        ends = np.cumsum(lengths)
        start = 0
        while start < len(rows):
            # As many rows as fill a batch; at least one.
            base = ends[start - 1] if start else 0
            until = max(int(np.searchsorted(ends, base + MAX_BATCH_ROWS, side="right")), start + 1)
            batch = np.arange(start, until)
            each = np.repeat(batch, lengths[batch])
            layer = np.arange(len(each)) - (ends[batch] - lengths[batch] - base - least[batch])[each - start]
            sums = sweep.remainder_bounds.sums(rest[batch], last[batch], None, row[batch])
            own_s = own[each] + chain.cost[node[each], layer]
            bound = own_s + ahead[each] + sweep.remainder_bounds.costs(sums.take(each - start, axis=1), layer)
            kept = np.flatnonzero(bound < below[each])
            batches.append((each[kept], layer[kept], own_s[kept], bound[kept]))
            start = until
        if not batches:
            return layouts.select_rows(_NONE)
        each, layer, own_s, bound = (np.concatenate(column) for column in zip(*batches, strict=True))
        if chain.problem.max_fetch_bytes is not None:
            fetch = layouts.fetch[rows[each]] + chain.fetch[node[each], layer] - chain.fetch[node[each], before[each]]
            kept = np.flatnonzero(fetch <= chain.problem.max_fetch_bytes)
            each, layer, own_s, bound = each[kept], layer[kept], own_s[kept], bound[kept]
        # Far more than the width are not worth comparing.
        few = _narrowed(row[each], bound, _CANDIDATES_PER_WIDTH * sweep.width, sweep.dropped)
        each, layer, own_s, bound = each[few], layer[few], own_s[few], bound[few]
        on_node, parent, links_s = node[each], rows[each], links[each]
        fetch = layouts.fetch[parent] + chain.fetch[on_node, layer] - chain.fetch[on_node, before[each]]
        key = task[each] << 16 | rest[each]
        key = (key << 4 | on_node) << 12 | layer
        kept = self._distinct(key, own_s + links_s, fetch)
        kept = kept[_narrowed(row[each[kept]], bound[kept], sweep.width, sweep.dropped)]
        each, layer, on_node, parent = each[kept], layer[kept], on_node[kept], parent[kept]
        stage_s = chain.s_per_work[on_node] * (chain.work[layer] - chain.work[before[each]])
        return PartialLayouts(
            task[each],
            rest[each],
            on_node,
            layer,
            own_s[kept],
            links_s[kept],
            np.maximum(layouts.slowest_s[parent], stage_s),
            fetch[kept],
            parent,
        )

    def _distinct(self, key: Ints, cost_s: Floats, fetch: Ints) -> Ints:
        """Return of the partial layouts with the same key the cheapest one; with a limit to fetched bytes, all that
        fetch less than every cheaper one. The key is all that what follows depends on."""
        ranked = np.lexsort((fetch, cost_s, key))
        key = key[ranked]
        new = np.ones(len(key), dtype=bool)
        new[1:] = key[1:] != key[:-1]
        if self.chain.problem.max_fetch_bytes is not None:
            # Ranks decrease from group to group, so that one running minimum serves all groups.
            ranks = np.unique(fetch[ranked], return_inverse=True)[1] - np.cumsum(new) * (len(key) + 1)
            new[1:] |= ranks[1:] < np.minimum.accumulate(ranks)[:-1]
        return ranked[new]

    # Complete layouts

    def _select(self, layouts: PartialLayouts, done: Ints, tasks: SearchTasks, levels: list[PartialLayouts]) -> None:
        task = layouts.task[done]
        back = self.bounds.link_s[tasks.last[task], tasks.first[task]]
        row = tasks.row[task]
        cost = np.maximum(
            layouts.stages_s[done] + layouts.links_s[done] + back, self.in_flight[row] * layouts.slowest_s[done]
        )
        for chosen_row in np.lexsort((cost, row)):
            if cost[chosen_row] < self.best[row[chosen_row]].cost_s:
                order, cuts = [int(layouts.node[done[chosen_row]])], [self.chain.layer_count]
                parent = int(layouts.parent[done[chosen_row]])
                for level in reversed(levels):
                    order.append(int(level.node[parent]))
                    cuts.append(int(level.layer[parent]))
                    parent = int(level.parent[parent])
                self.best[row[chosen_row]] = Incumbent(float(cost[chosen_row]), order[::-1], [0, *cuts[::-1]])


def _narrowed(row: Ints, bound_s: Floats, width: int, dropped: Floats) -> Ints:
    """Return which to keep: `width` of each row, those with the least bounds. `row` must not decrease."""
    if len(row) <= width:
        return np.arange(len(row))
    starts = row.searchsorted(np.arange(len(dropped) + 1))
    wide = (starts[1:] - starts[:-1] > width).nonzero()[0]
    if not len(wide):
        return np.arange(len(row))
    kept = np.ones(len(row), dtype=bool)
    for wide_row in wide.tolist():
        entries = slice(starts[wide_row], starts[wide_row + 1])
        bounds = bound_s[entries]
        ranked = bounds.argpartition(width)
        dropped[wide_row] = min(dropped[wide_row], bounds[ranked[width]])
        kept[entries][ranked[width:]] = False
    return kept.nonzero()[0]


def _least(values: Floats, count: int) -> Ints:
    """Return the indices of the least `count` values; the largest of them last."""
    if len(values) <= count:
        return np.arange(len(values))
    return np.argpartition(values, count - 1)[:count]
