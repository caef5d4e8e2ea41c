"""What is asked of the solver: the best layout, and a preview of all that are worth a look."""

from __future__ import annotations

from shoal_placement.solve import exact, large
from shoal_placement.solve.problem import Answer, Problem
from shoal_placement.solve.subsets import MOST


def best(problem: Problem) -> Answer:
    """The best layout; of equals, the one with the fewest nodes. Proved for up to 16 nodes, or it says so."""
    return exact.best(problem) if len(problem.nodes) <= MOST else large.best(problem)


def preview(problem: Problem) -> dict[int, Answer]:
    """The best layout that a short search finds over exactly k nodes, for each k that is allowed.

    It proves what a narrow search and its bounds prove, and no more.
    """
    if len(problem.nodes) <= MOST:
        return exact.best_for_each_count(problem, exact.SHORT)
    return large.best_for_each_count(problem)
