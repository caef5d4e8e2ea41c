"""The solver's entry points: the best layout, and a preview with the best one for each number of nodes."""

from __future__ import annotations

from shoal_placement.solver import branch_and_bound, neighborhood_search
from shoal_placement.solver.problem import Problem, Solution
from shoal_placement.solver.subsets import MAX_NODES


def solve(problem: Problem) -> Solution:
    """Return the best layout; of equal ones, the one with the fewest nodes.

    Up to 16 nodes it is proved to be the best, unless the search had to end early: see `Answer.proved`.
    """
    return branch_and_bound.best(problem) if len(problem.nodes) <= MAX_NODES else neighborhood_search.best(problem)


def solve_each_count(problem: Problem) -> dict[int, Solution]:
    """Return the best layout that a short search finds over exactly k nodes, for each k that is allowed.

    It is proved only as far as a narrow search and its bounds prove it.
    """
    if len(problem.nodes) <= MAX_NODES:
        return branch_and_bound.best_for_each_count(problem, branch_and_bound.SHORT_EFFORT)
    return neighborhood_search.best_for_each_count(problem)
