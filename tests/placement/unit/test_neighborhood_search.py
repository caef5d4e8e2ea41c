"""Clusters of more nodes than all subsets can be enumerated of."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from shoal_placement.solver import branch_and_bound, neighborhood_search
from shoal_placement.solver.best_layout import solve, solve_each_count
from shoal_placement.solver.cost import meets_constraints
from shoal_placement.solver.problem import IN_FLIGHT_PER_STAGE, Node, Problem, Solution
from tests.placement import oracle
from tests.placement.random_clusters import random_placement


def check(problem: Problem, answer: Solution) -> None:
    """Check that the layout meets all constraints, costs what the answer says, and no less than the bound."""
    assert answer.layout is not None
    assert meets_constraints(problem, answer.layout)
    place = {n.name: i for i, n in enumerate(problem.nodes)}
    slices = answer.layout.slices
    assert all(a.last == b.first for a, b in itertools.pairwise(slices))
    expected = oracle.cost(problem, [place[s.node] for s in slices], [0, *(s.last for s in slices)])
    assert answer.layout.cost_s == pytest.approx(expected)
    assert answer.lower_bound_s <= answer.layout.cost_s


@pytest.mark.parametrize("in_flight", [1, 8, IN_FLIGHT_PER_STAGE])
@pytest.mark.parametrize("nodes", [17, 40, 120])
def test_a_layout_fits_and_costs_what_it_claims(nodes: int, in_flight: int) -> None:
    for seed in range(3):
        problem = random_placement(seed, nodes, in_flight)
        check(problem, solve(problem))


@pytest.mark.parametrize("in_flight", [1, 8, IN_FLIGHT_PER_STAGE])
def test_the_bound_is_below_the_best_there_is(in_flight: int) -> None:
    for seed in range(6):
        problem = random_placement(seed, 10, in_flight)
        proved = branch_and_bound.best(problem)
        rough = neighborhood_search.best(problem)
        assert proved.proved and proved.layout is not None and rough.layout is not None
        assert (
            neighborhood_search.LargeProblem(problem).lower_bound <= proved.layout.cost_s
            or len(proved.layout.slices) == 1
        )
        assert rough.lower_bound_s <= proved.layout.cost_s * (1 + 1e-9)
        assert rough.layout.cost_s >= proved.layout.cost_s * (1 - 1e-9)


def test_a_preview_of_a_large_cluster_answers_each_node_count() -> None:
    problem = random_placement(1, 60, 1)
    answers = solve_each_count(problem)
    assert sorted(answers) == list(range(1, 17))
    for k, answer in answers.items():
        if answer.layout is not None:
            check(msgspec.structs.replace(problem, min_nodes=k, max_nodes=k), answer)
    over_all = solve(problem)
    assert over_all.layout is not None
    assert min(a.layout.cost_s for a in answers.values() if a.layout) == pytest.approx(over_all.layout.cost_s)


def test_a_model_larger_than_a_neighbourhood_is_solved() -> None:
    nodes = [Node(f"n{i}", 25, 1.0 + i % 3) for i in range(40)]
    names = range(40)
    problem = Problem(
        nodes=nodes,
        layer_bytes=[10] * 50,
        link_s=[[0.0 if a == b else 0.1 + (a + b) % 5 / 10 for b in names] for a in names],
        max_nodes=32,
    )
    answer = solve(problem)
    check(problem, answer)
    assert answer.layout is not None and len(answer.layout.slices) >= 25


def test_a_model_that_no_number_of_nodes_can_hold_is_refused() -> None:
    problem = Problem(nodes=[Node(f"n{i}", 9, 1.0) for i in range(40)], layer_bytes=[10] * 4, max_nodes=40)
    answer = solve(problem)
    assert answer.layout is None and answer.proved
