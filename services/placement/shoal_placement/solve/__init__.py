"""The layout problem and its solver: pure. `problem.py` defines the problem and the answer."""

from shoal_placement.solve.problem import Answer, Layout, Node, Problem, Slice
from shoal_placement.solve.rooms import Need, Room, problem_of, slice_bytes, solved

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
