"""The layout problem and its solver: pure. `problem.py` defines the problem and the answer."""

from shoal_placement.solver.build_problem import Need, Room, problem_of, slice_bytes, solved
from shoal_placement.solver.problem import Answer, Layout, Node, Problem, Slice

__all__ = [
    "Answer",
    "Layout",
    "Need",
    "Node",
    "Problem",
    "Room",
    "Slice",
    "problem_of",
    "slice_bytes",
    "solved",
]
