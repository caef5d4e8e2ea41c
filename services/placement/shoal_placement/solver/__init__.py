"""The layout problem and its solver: pure. `problem.py` defines the problem and the answer."""

from shoal_placement.solver.build_problem import ModelNeed, NodeCapacity, build_problem, slice_bytes, solve_balanced
from shoal_placement.solver.problem import Layout, Node, Problem, Solution, StageSlice

__all__ = [
    "Layout",
    "ModelNeed",
    "Node",
    "NodeCapacity",
    "Problem",
    "Solution",
    "StageSlice",
    "build_problem",
    "slice_bytes",
    "solve_balanced",
]
