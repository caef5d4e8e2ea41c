"""What a missing answer means before a liveness key expires, and what a missing key means after an outage."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.messages.instances import InstanceState
from shoal_common.names import SERVICES
from shoal_placement.leader.failure_rules import PINGED_SERVICES, nodes_present, services_to_ping, unresponsive_keys

NODES = ("a", "a-2", "b")
keys = st.sets(st.builds(lambda n, s: f"{n}.{s}", st.sampled_from(NODES), st.sampled_from(SERVICES)))
nodes = st.sets(st.sampled_from(NODES))


def instance(phase: str, *on: str) -> InstanceState:
    return InstanceState(id="i", repo="org/name", commit="c", phase=phase, nodes=list(on))  # type: ignore[arg-type]  # one of its literals


@given(keys, st.sampled_from(NODES))
def test_only_live_services_that_answer_rpcs_are_pinged(live: set[str], node: str) -> None:
    asked = services_to_ping(node, live)
    assert {f"{node}.{service}" for service in asked} <= live
    assert set(asked) <= set(PINGED_SERVICES)


@given(keys, st.sampled_from(NODES), st.data())
def test_a_service_that_answers_is_up_and_others_do_not_matter(
    live: set[str], node: str, data: st.DataObject
) -> None:
    answered = {service: data.draw(st.booleans()) for service in services_to_ping(node, live)}
    silent = unresponsive_keys(node, live, answered)
    assert silent <= {key for key in live if key.startswith(f"{node}.")}
    assert not {f"{node}.{service}" for service, spoke in answered.items() if spoke} & silent
    assert {f"{node}.{service}" for service, spoke in answered.items() if not spoke} <= silent


def test_when_all_services_are_silent_unasked_ones_are_down_too() -> None:
    live = {"a.inference", "a.fileserver", "b.fileserver"}
    assert unresponsive_keys("a", live, {"inference": False}) == {"a.inference", "a.fileserver"}
    assert unresponsive_keys("a", live, {"inference": True}) == set()
    assert unresponsive_keys("b", live, {}) == set(), "where nobody was asked nobody is suspect"


@given(nodes, nodes, st.sampled_from(["starting", "ready", "degraded", "failed"]), st.booleans())
def test_a_silent_node_is_absent_and_outages_cover_missing_keys(
    live: set[str], silent: set[str], phase: str, settled: bool
) -> None:
    here = nodes_present(live, silent, instance(phase, "a", "b"), settled)
    assert not here & silent
    assert live - silent <= here
    if settled or phase != "ready":
        assert here == live - silent
    else:
        assert {"a", "b"} - silent <= here
    assert nodes_present(live, silent, None, settled) == live - silent
