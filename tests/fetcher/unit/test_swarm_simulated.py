"""The decisions of many nodes together: a swarm finishes despite failures, and evenly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_common.store.bitmap import LEAF_BYTES
from simulated_nodes import Link, Outcome
from swarm_simulator import Simulation

LEAVES = 64
B = 25e6
DEADLINE_S = 3600.0


def over_bound(outcome: Outcome, leaf_count: int) -> float:
    """Return the last finish over F/B, the time that one copy takes on one link."""
    assert not outcome.unfinished
    return max(outcome.finished_s.values()) * B / (leaf_count * LEAF_BYTES)


@pytest.mark.parametrize("count", [4, 8])
def test_a_source_sends_little_more_than_once_until_all_finish(count: int) -> None:
    outcome = Simulation([Link()], [Link()] * count, leaf_count=256, seed=1).run()
    assert over_bound(outcome, 256) <= {4: 1.08, 8: 1.12}[count]
    assert outcome.sent_bytes["s0"] <= 1.02 * 256 * LEAF_BYTES


def test_a_slow_uplink_holds_nobody_up() -> None:
    outcome = Simulation([Link()], [Link(up=B / 4), Link(), Link(), Link()], leaf_count=256, seed=1).run()
    assert over_bound(outcome, 256) <= 1.2


def test_a_fast_source_makes_up_for_uplinks_that_are_all_slow() -> None:
    outcome = Simulation([Link(up=40 * B, down=40 * B)], [Link(up=B / 10)] * 4, leaf_count=256, seed=1).run()
    assert over_bound(outcome, 256) <= 2.0


def test_a_fast_node_does_not_wait_for_slow_ones() -> None:
    fast = Link(up=40 * B, down=40 * B)
    outcome = Simulation([fast], [fast, Link(), Link(), Link()], leaf_count=256, seed=1).run()
    assert over_bound(outcome, 256) <= 1.1
    assert outcome.finished_s["n0"] <= max(outcome.finished_s.values()) / 4


def test_one_fetcher_uses_several_sources_by_rate_and_no_doubles() -> None:
    sources = [Link(up=B / 8), Link(up=B / 2), Link(up=3 * B / 8)]
    outcome = Simulation(sources, [Link()], leaf_count=256, seed=1).run()
    assert over_bound(outcome, 256) <= 1.1
    assert sum(outcome.sent_bytes.values()) <= 1.03 * 256 * LEAF_BYTES


def test_above_sixteen_nodes_blobs_propagate_over_the_graph() -> None:
    outcome = Simulation([Link()], [Link()] * 40, leaf_count=LEAVES, seed=1).run()
    assert over_bound(outcome, LEAVES) <= 2.0


LINKS = st.builds(
    Link,
    up=st.sampled_from([B / 20, B / 4, B, 10 * B]),
    down=st.sampled_from([B / 4, B, 10 * B]),
    joins_s=st.sampled_from([0.0, 0.0, 0.5, 5.0]),
)
FAULTS = st.sampled_from(["", "", "dies", "sticks"])


@st.composite
def fetchers(draw: st.DrawFn) -> list[Link]:
    links = draw(st.lists(LINKS, min_size=1, max_size=20))
    made = []
    for link in links:
        fault, at_s = draw(FAULTS), draw(st.floats(0.1, 4.0))
        made.append(
            Link(
                up=link.up,
                down=link.down,
                joins_s=link.joins_s,
                dies_s=link.joins_s + at_s if fault == "dies" else None,
                sticks_s=link.joins_s + at_s if fault == "sticks" else None,
            )
        )
    return made


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([Link(), Link(up=B / 20)]), min_size=1, max_size=3),
    fetchers(),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 2**16),
)
def test_I7_survivors_finish_despite_deaths_stalls_and_losses(
    sources: list[Link], others: list[Link], lost: float, seed: int
) -> None:
    outcome = Simulation(sources, others, leaf_count=24, lost=lost, seed=seed).run(DEADLINE_S)
    assert not outcome.unfinished


@pytest.mark.parametrize("survivor", range(20))
def test_I7_a_node_whose_neighbours_have_all_died_finishes(survivor: int) -> None:
    others = [Link() if n == survivor else Link(dies_s=0.1) for n in range(20)]
    assert not Simulation([Link()], others, leaf_count=LEAVES, seed=1).run(DEADLINE_S).unfinished


@settings(max_examples=25)
@given(st.integers(2, 8), st.integers(0, 2**16), st.floats(0.1, 3.0), st.booleans())
def test_I7_a_dead_or_stalled_source_is_no_loss_with_another(count: int, seed: int, at_s: float, dies: bool) -> None:
    failing = Link(dies_s=at_s) if dies else Link(sticks_s=at_s)
    outcome = Simulation([failing, Link()], [Link()] * count, leaf_count=LEAVES, seed=seed).run(DEADLINE_S)
    assert not outcome.unfinished


@settings(max_examples=25)
@given(st.integers(3, 8), st.integers(0, 2**16), st.floats(0.5, 3.0))
def test_I7_fetchers_finish_what_they_hold_without_the_source(count: int, seed: int, at_s: float) -> None:
    simulation = Simulation([Link(dies_s=at_s)], [Link()] * count, leaf_count=LEAVES, seed=seed)
    simulation.run(at_s + 30.0)
    together, each = 0, [n.have for n in simulation.nodes.values() if not n.source]
    for have in each:
        together |= have
    assert set(each) == {together}
