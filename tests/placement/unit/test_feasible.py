"""What fits is never refused, what does not fit is never returned: against an independent check."""

from __future__ import annotations

import itertools
import random
from functools import cache

import msgspec
import numpy as np
import pytest

from shoal_placement.solver.best_layout import solve_each_count
from shoal_placement.solver.branch_and_bound import best
from shoal_placement.solver.cost import CostModel, meets_constraints
from shoal_placement.solver.feasible import Feasibility
from shoal_placement.solver.problem import Problem
from tests.placement.oracle import random_problem, stage


def can_fit(problem: Problem) -> bool:
    """Return whether some order of some allowed set has a split in which every stage fits: depth first, memoized."""
    end = len(problem.layer_bytes)

    @cache
    def onward(used: frozenset[int], first: int) -> bool:
        if first == end:
            names = {problem.nodes[i].name for i in used}
            return problem.min_nodes <= len(used) <= problem.max_nodes and set(problem.layer_counts) <= names
        if len(used) == problem.max_nodes:
            return False
        for i, node in enumerate(problem.nodes):
            if i in used:
                continue
            for last in range(first + 1, end + 1):
                fits = stage(problem, node, first, last)[0] <= node.free_bytes
                asked = problem.layer_counts.get(node.name, last - first) == last - first
                if fits and asked and onward(used | {i}, last):
                    return True
        return False

    return onward(frozenset(), 0)


def problems_with(problem: Problem) -> str:
    """Return what is wrong with the solver's answer; empty if nothing is."""
    layout, possible = best(problem).layout, can_fit(problem)
    if layout is None:
        return "refused, and it fits" if possible else ""
    if not meets_constraints(problem, layout):
        return "given, and it does not fit"
    return "" if possible else "given, and nothing fits"


def tight_problem(chance: random.Random) -> Problem:
    """Return a cluster with about as much memory as the model needs."""
    problem = random_problem(chance, chance.randint(1, 5), chance.randint(1, 10))
    whole = sum(problem.layer_bytes) + problem.embed_bytes + problem.head_bytes
    share = [chance.random() for _ in problem.nodes]
    scale = whole * chance.uniform(0.9, 1.5) / sum(share)
    nodes = [msgspec.structs.replace(n, free_bytes=int(scale * s)) for n, s in zip(problem.nodes, share, strict=True)]
    return msgspec.structs.replace(problem, nodes=nodes, max_fetch_bytes=None)


@pytest.mark.parametrize("seed", range(40))
def test_exactly_what_fits_is_placed(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(15):
        problem = tight_problem(chance)
        assert problems_with(problem) == "", problem


@pytest.mark.parametrize("seed", range(20))
def test_a_preview_has_a_layout_for_each_node_count_that_fits(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(5):
        problem = tight_problem(chance)
        for count, answer in solve_each_count(problem).items():
            asked = msgspec.structs.replace(problem, min_nodes=count, max_nodes=count)
            assert (answer.layout is not None) == can_fit(asked), asked
            assert answer.layout is None or meets_constraints(asked, answer.layout)


@pytest.mark.parametrize("seed", range(30))
def test_of_each_set_it_is_known_whether_it_can_hold_the_layers(seed: int) -> None:
    problem = tight_problem(random.Random(seed))
    if len(problem.layer_bytes) < 2:
        return
    fits = Feasibility(CostModel(problem, problem.nodes))
    for size in range(2, len(problem.nodes) + 1):
        for chosen in itertools.combinations(range(len(problem.nodes)), size):
            subset = sum(1 << i for i in chosen)
            part = msgspec.structs.replace(
                problem,
                nodes=[problem.nodes[i] for i in chosen],
                min_nodes=size,
                max_nodes=size,
                layer_counts={
                    n: c for n, c in problem.layer_counts.items() if n in {problem.nodes[i].name for i in chosen}
                },
            )
            possible = can_fit(part)
            assert bool(fits(np.array([subset]))[0]) == possible
            if possible:
                order, cuts = fits.layout(subset)
                assert sorted(order) == list(chosen)
                for node, first, last in zip(order, cuts, cuts[1:], strict=False):
                    assert stage(problem, problem.nodes[node], first, last)[0] <= problem.nodes[node].free_bytes
