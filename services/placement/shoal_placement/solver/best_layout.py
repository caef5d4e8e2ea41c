"""The solver's entry points: the best layout, and a preview with the best one for each number of nodes."""

from __future__ import annotations

from shoal_placement.solver import branch_and_bound, neighborhood_search
from shoal_placement.solver.problem import Answer, Problem
from shoal_placement.solver.subsets import MOST


def best(problem: Problem) -> Answer:
    """Return the best layout; of equal ones, the one with the fewest nodes.

    Up to 16 nodes it is proved to be the best, unless the search had to end early: see `Answer.proved`.
    """
    return branch_and_bound.best(problem) if len(problem.nodes) <= MOST else neighborhood_search.best(problem)


def preview(problem: Problem) -> dict[int, Answer]:
    """Return the best layout that a short search finds over exactly k nodes, for each k that is allowed.

    It is proved only as far as a narrow search and its bounds prove it.
    """
    if len(problem.nodes) <= MOST:
        return branch_and_bound.best_for_each_count(problem, branch_and_bound.SHORT)
    return neighborhood_search.best_for_each_count(problem)
