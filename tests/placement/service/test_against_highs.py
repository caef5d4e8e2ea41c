"""The exact solver against HiGHS, at sizes that brute force cannot check."""

from __future__ import annotations

import random

import msgspec
import pytest

from shoal_placement.solver.branch_and_bound import best
from tests.placement.oracle import INF, random_problem


@pytest.mark.parametrize(
    "seed", [1, 2, 4, *(pytest.param(n, marks=pytest.mark.long) for n in (0, 3, 5, *range(6, 30)))]
)
def test_highs_finds_nothing_better(seed: int) -> None:
    pytest.importorskip("highspy", reason="a requirement of tests that is not installed here: `make setup`")
    from tests.placement.milp import solve_milp

    chance = random.Random(seed)
    nodes = chance.randint(8, 10)
    problem = random_problem(chance, nodes, nodes + 2)
    stages = chance.randint(3, 6)
    problem = msgspec.structs.replace(
        problem, layer_counts={}, max_fetch_bytes=None, min_nodes=stages, max_nodes=stages
    )
    least = solve_milp(problem, stages)
    if least is None:
        pytest.skip("HiGHS did not end in time")
    answer = best(problem)
    assert answer.proved
    cost_s = INF if answer.layout is None else answer.layout.cost_s
    assert cost_s == pytest.approx(least, rel=1e-6, abs=1e-6)
