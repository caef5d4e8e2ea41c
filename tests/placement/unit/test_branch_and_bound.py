"""The exact solver against brute force."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_placement.solver.branch_and_bound import SHORT_EFFORT, best, best_for_each_count
from shoal_placement.solver.cost import meets_constraints
from shoal_placement.solver.problem import IN_FLIGHT_PER_STAGE, Node, Problem, Solution
from tests.placement import oracle
from tests.placement.oracle import INF, random_problem


def cost_of(answer: Solution) -> float:
    return INF if answer.layout is None else answer.layout.cost_s


def check(problem: Problem, answer: Solution, least: float) -> None:
    """Check that the layout meets all constraints, costs what the answer says, and that none costs less."""
    assert answer.proved
    assert cost_of(answer) == pytest.approx(least, rel=1e-7, abs=1e-9)
    assert answer.lower_bound_s <= cost_of(answer)
    if answer.layout is None:
        assert least == INF
        return
    assert meets_constraints(problem, answer.layout)
    place = {n.name: i for i, n in enumerate(problem.nodes)}
    slices = answer.layout.slices
    assert [s.first for s in slices] == [0, *(s.last for s in slices[:-1])]
    cuts = [0, *(s.last for s in slices)]
    assert cuts[-1] == len(problem.layer_bytes)
    expected = oracle.cost(problem, [place[s.node] for s in slices], cuts)
    assert answer.layout.cost_s == pytest.approx(expected, rel=1e-9, abs=1e-12)


def compare(problem: Problem) -> None:
    least = oracle.best_by_count(problem)
    answers = best_for_each_count(problem)
    assert answers.keys() == least.keys()
    for k, answer in answers.items():
        check(msgspec.structs.replace(problem, min_nodes=k, max_nodes=k), answer, least[k])
    check(problem, best(problem), min(least.values(), default=INF))


@pytest.mark.parametrize("seed", range(60))
def test_on_random_small_clusters_nothing_better_is_missed(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(5):
        compare(random_problem(chance, chance.randint(1, 4), chance.randint(1, 8)))


@pytest.mark.parametrize("seed", range(8))
def test_on_five_nodes_with_ten_layers_nothing_better_is_missed(seed: int) -> None:
    compare(random_problem(random.Random(seed), 5, 10))


@pytest.mark.parametrize("in_flight", [1, 4, 8, IN_FLIGHT_PER_STAGE])
def test_with_equal_layers_nothing_better_is_missed(in_flight: int) -> None:
    for seed in range(20):
        chance = random.Random(seed)
        compare(oracle.with_in_flight(random_problem(chance, 4, chance.randint(2, 8), equal=True), in_flight))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 7))
def test_whatever_the_cluster_nothing_better_is_missed(seed: int, nodes: int, layers: int) -> None:
    compare(random_problem(random.Random(seed), nodes, layers))


def twins(count: int, link_s: float, in_flight: int = 1) -> Problem:
    """Return a problem with so many equal nodes, equally far from each other."""
    names = [f"n{i}" for i in range(count)]
    return Problem(
        nodes=[Node(name, 60, s_per_work=1.0) for name in names],
        layer_bytes=[10] * 32,
        link_s=[[0.0 if a == b else link_s for b in names] for a in names],
        in_flight=in_flight,
    )


def test_sixteen_equal_nodes_are_solved_to_a_proved_optimum() -> None:
    answer = best(twins(16, 0.5))
    assert answer.proved
    assert answer.layout is not None
    # Six layers fit on a node, so six nodes are needed, and each additional one costs a link.
    assert len(answer.layout.slices) == 6
    assert answer.layout.cost_s == pytest.approx(32 + 6 * 0.5)


def test_with_more_in_flight_more_nodes_are_worth_their_links() -> None:
    answer = best(twins(16, 0.5, in_flight=16))
    assert answer.proved
    assert answer.layout is not None
    # Two layers on each of 16 nodes: 32 + 16 * 0.5 for a token, 16 * 2 for 16 tokens. On eleven nodes it is 16 * 3.
    assert len(answer.layout.slices) == 16
    assert answer.layout.bottleneck_s == 2
    assert answer.layout.cost_s == pytest.approx(40)


def test_a_search_cut_short_is_unproved_with_a_lower_bound() -> None:
    for seed in range(40):
        problem = random_problem(random.Random(seed), 8, 12)
        rough = best_for_each_count(problem, SHORT_EFFORT)
        for k, answer in best_for_each_count(problem).items():
            assert answer.proved
            assert rough[k].lower_bound_s <= cost_of(answer) * (1 + 1e-7)
            assert cost_of(rough[k]) >= cost_of(answer) * (1 - 1e-7)
            if rough[k].proved:
                assert cost_of(rough[k]) == pytest.approx(cost_of(answer), rel=1e-7)


def test_layers_that_people_fixed_stay_fixed() -> None:
    problem = msgspec.structs.replace(twins(4, 0.5), layer_counts={"n2": 1, "n3": 5}, layer_bytes=[5] * 14)
    answer = best(problem)
    assert answer.proved
    assert answer.layout is not None
    given_layers = {s.node: s.last - s.first for s in answer.layout.slices}
    assert (given_layers["n2"], given_layers["n3"], sum(given_layers.values())) == (1, 5, 14)


def test_no_more_is_fetched_than_was_allowed() -> None:
    nodes = [Node("fast", 100, 1.0, fetch_bytes=[10] * 8), Node("slow", 100, 2.0)]
    problem = Problem(nodes=nodes, layer_bytes=[10] * 8, link_s=[[0, 0.1], [0.1, 0]])
    free, bound, none = (
        best(msgspec.structs.replace(problem, max_fetch_bytes=most)).layout for most in (None, 30, 0)
    )
    assert free is not None and bound is not None and none is not None
    assert [s.node for s in free.slices] == ["fast"]
    assert (bound.fetch_bytes, len(bound.slices)) == (30, 2)
    assert [s.node for s in none.slices] == ["slow"]


def test_of_two_equal_nodes_the_one_with_more_files_is_taken() -> None:
    # A published example: of two nodes of 1000 bytes that hold 80 and 30 % of a model of 1000 bytes, the first.
    nodes = [Node("30", 1000, 1.0, fetch_bytes=[70] * 10), Node("80", 1000, 1.0, fetch_bytes=[20] * 10)]
    layout = best(Problem(nodes=nodes, layer_bytes=[100] * 10, fetch_price_s_per_byte=1e-6)).layout
    assert layout is not None
    assert ([s.node for s in layout.slices], layout.fetch_bytes) == (["80"], 200)
