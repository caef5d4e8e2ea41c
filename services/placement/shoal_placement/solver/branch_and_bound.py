"""The best layout over at most 16 nodes, for each number of nodes or over all of them.

First a narrow search where the bounds are lowest; then wider and wider ones for anything better, until nothing was
dropped for lack of width. That is a proof. If the effort is spent before, the answer says that it is not proved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from shoal_placement.solver.beam_search import INF, BeamSearch, Incumbent
from shoal_placement.solver.bounds import Bounds
from shoal_placement.solver.cost import CostModel, Floats, make_layout, meets_constraints
from shoal_placement.solver.feasible import Feasibility
from shoal_placement.solver.fractional_knapsack import COST_TOLERANCE
from shoal_placement.solver.problem import Layout, Problem, Solution

_WIDER = 16
_NEAR = 1e-3
_STEPS_OVER_BOUND = (1.03, 1.2, 2.0, INF)


class SearchEffort(msgspec.Struct, frozen=True):
    """How long to search, in partial layouts and not in time: a problem has the same answer on every machine."""

    max_partial_layouts: int = 20_000_000
    """Partial layouts before the proof is given up: some seconds."""
    first_width: int = 12
    """Partial layouts that the first search keeps of each number of nodes at each stage."""
    halvings: int = 12


THOROUGH_EFFORT = SearchEffort()
SHORT_EFFORT = SearchEffort(max_partial_layouts=0, first_width=3, halvings=3)
"""Only the narrow searches."""


def best_for_each_count(problem: Problem, effort: SearchEffort = THOROUGH_EFFORT) -> dict[int, Solution]:
    """Return the best layout over exactly k nodes, for each k that is allowed."""
    return _solve(problem, effort, False, INF)


def best(problem: Problem, effort: SearchEffort = THOROUGH_EFFORT, known_s: float = INF) -> Solution:
    """Return the best layout over any allowed number of nodes; of equal ones, the one with the fewest nodes.

    Its `layout` is None if none costs less than `known_s`.
    """
    answers = _solve(problem, effort, True, known_s)
    lower = min((a.lower_bound_s for a in answers.values()), default=INF)
    layouts = [a.layout for _, a in sorted(answers.items()) if a.layout is not None]
    if not layouts:
        return Solution(None, lower, proved=all(a.proved for a in answers.values()))
    layout = min(layouts, key=lambda x: x.cost_s)
    layout = next(x for x in layouts if x.cost_s <= layout.cost_s * (1 + COST_TOLERANCE))
    return Solution(layout, min(lower, layout.cost_s), proved=lower >= layout.cost_s * (1 - 2 * COST_TOLERANCE))


def _solve(problem: Problem, effort: SearchEffort, together: bool, known_s: float) -> dict[int, Solution]:
    chain = CostModel(problem, problem.nodes)
    count = len(problem.nodes)
    max_count = min(problem.max_nodes, count, chain.layer_count)
    answers: dict[int, Solution] = {}
    if problem.min_nodes <= 1 <= max_count:
        answers[1] = best_single_node(problem, chain)
    counts = range(max(problem.min_nodes, 2), max_count + 1)
    if not counts:
        return answers
    search = BeamSearch(Bounds(chain, link_table(problem)), counts)
    lower = _run(search, effort, min(known_s, _cost(answers[1].layout) if 1 in answers else INF), together)
    for k, incumbent, least in zip(counts, search.best, lower, strict=True):
        layout = make_layout(problem, incumbent.order, incumbent.cuts, chain) if incumbent.order else None
        cost = _cost(layout)
        answers[k] = Solution(layout, min(float(least), cost), bool(least >= cost * (1 - 2 * COST_TOLERANCE)))
    return answers


def _cost(layout: Layout | None) -> float:
    return INF if layout is None else layout.cost_s


def link_table(problem: Problem) -> Floats:
    """Return the seconds from node to node as a table; zeros if the problem has no links."""
    count = len(problem.nodes)
    link_s = np.zeros((count, count))
    # Row by row: a large table in one call would block other threads.
    for node, row in enumerate(problem.link_s):
        link_s[node] = row
    np.fill_diagonal(link_s, 0.0)
    return link_s


def best_single_node(problem: Problem, chain: CostModel) -> Solution:
    """Return the best layout over a single node, of all nodes. `chain` is the problem's."""
    # Holding a tied embedding once makes a node cheaper by at most this much.
    tied = max((n.price_s_per_byte for n in problem.nodes), default=0.0) * chain.tied_bytes
    tied += problem.fetch_price_s_per_byte * chain.tied_bytes
    least = np.maximum(chain.cost[:, -1] - tied, chain.in_flight(1) * chain.s_per_work * chain.work[-1])
    holds = np.flatnonzero(chain.free_bytes >= chain.bytes[-1] - chain.tied_bytes + problem.stage_bytes)
    best: Layout | None = None
    for i in holds[np.lexsort((chain.cost[holds, -1], least[holds]))].tolist():
        if best is not None and least[i] * (1 - COST_TOLERANCE) > best.cost_s:
            break
        layout = make_layout(problem, [i], [0, chain.layer_count], chain)
        if meets_constraints(problem, layout) and layout.cost_s < _cost(best):
            best = layout
    return Solution(best, _cost(best), proved=True)


def _run(search: BeamSearch, effort: SearchEffort, known_s: float, together: bool) -> Floats:
    """Search until all is proved or the effort is spent. Return a lower bound of the cost for each count; with
    `together`, only of layouts that could be the best over all counts."""
    lower = search.lower_bounds()

    def goal() -> Floats:
        by_count = np.array([f.cost_s for f in search.best])
        return np.full(len(by_count), min(known_s, by_count.min())) if together else by_count

    def sweep(below: Floats, wanted: Sequence[bool], width: int) -> bool:
        """Return whether something better was found. If not, a complete search has raised the lower bounds."""
        before = [f.cost_s for f in search.best]
        target = np.where(wanted, below, 0.0)
        dropped = search.sweep(target, width)
        after = [f.cost_s for f in search.best]
        # What was found has the least T; with several in flight a larger T may still have the better bottleneck.
        better = np.array(after) < before
        proved = np.where(better, np.where(search.in_flight <= 1, np.minimum(target, after), 0.0), target)
        np.maximum(lower, np.minimum(proved, dropped), out=lower)
        return bool(better.any())

    _narrowly(search, goal, sweep, lower, effort)
    search.exact_links = True
    width = effort.first_width
    while search.partial_layout_count < effort.max_partial_layouts:
        open_ = lower < goal() * (1 - COST_TOLERANCE)
        if not open_.any():
            break
        if not sweep(goal(), list(open_), width):
            width *= _WIDER
    return lower


def _fitting(search: BeamSearch, goal: Floats, lower: Floats) -> None:
    """For each number of nodes without a layout, find one that fits, or prove that there is none."""
    missing = [int(row) for row in np.flatnonzero((goal == INF) & (lower < INF))]
    if not missing:
        return
    fits = Feasibility(search.chain)
    problem = search.chain.problem
    for row in missing:
        able = fits(search.sets[row])
        search.sets[row], search.bounds_by_set[row] = search.sets[row][able], search.bounds_by_set[row][able]
        if not len(search.sets[row]):
            lower[row] = INF
        elif problem.max_fetch_bytes is None:
            order, cuts = fits.layout(int(search.sets[row][0]))
            search.best[row] = Incumbent(make_layout(problem, order, cuts, search.chain).cost_s, order, cuts)


def _narrowly(
    search: BeamSearch,
    goal: Callable[[], Floats],
    sweep: Callable[[Floats, Sequence[bool], int], bool],
    lower: Floats,
    effort: SearchEffort,
) -> None:
    """Find a good layout for each count, searching first for costs just above the lower bound.

    With several requests in flight the layout with the least T below a cost costs only just less than that. So halve
    the interval between the best cost and the lower bound instead, while something is found. The same sweeps do both.
    """
    hopeless, steps = lower.copy(), list(_STEPS_OVER_BOUND)
    halvings, fitted = effort.halvings, False
    while True:
        unknown = (goal() == INF) & (lower < INF)
        if not steps:
            if unknown.any() and not fitted:
                _fitting(search, goal(), lower)
            unknown[:], fitted = False, True
        before = goal()
        closer = (search.in_flight > 1) & (before < INF) & (hopeless < before * (1 - _NEAR)) & (halvings > 0)
        if not (unknown | closer).any():
            return
        step = steps.pop(0) if unknown.any() else INF
        halvings -= bool(closer.any())
        with np.errstate(invalid="ignore"):
            middle = np.sqrt(hopeless * before)
        target = np.where(closer, middle, np.maximum(lower, 1e-300) * step)
        sweep(target, list(unknown | closer), effort.first_width)
        hopeless = np.where(closer & ~(goal() < before), middle, hopeless)
