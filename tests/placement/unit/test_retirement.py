"""Which nodes are retired, and which keys name them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.bus.keys import download_key, links_key, model_key, shard_key, stage_key, storage_key
from shoal_common.messages.instances import InstanceSpec, StageSpec, StageState
from shoal_common.messages.placement import NodeState
from shoal_common.names import ModelId
from shoal_placement.leader.retirement import keys_by_node, plan_retirement

NODES = st.sampled_from("abcdef")
SETS = st.frozensets(NODES)
NOW_S, AFTER_S = 1000.0, 100.0


@given(SETS, SETS, st.dictionaries(NODES, st.tuples(st.floats(0, 1100), st.booleans())))
def test_I8_exactly_those_that_are_down_and_due_are_retired(
    named: frozenset[str], live: frozenset[str], facts: dict[str, tuple[float, bool]]
) -> None:
    states = {n: NodeState(node=n, down_since_s=since_s, forget_requested=f) for n, (since_s, f) in facts.items()}
    actions = plan_retirement(named, live, states, NOW_S, AFTER_S)
    due = {n for n, s in states.items() if s.forget_requested or NOW_S - s.down_since_s >= AFTER_S}
    assert {s.node for s in actions.retire} == due - live
    assert {s.node for s in actions.publish_down} == named - live - states.keys()
    assert all(s.down_since_s == NOW_S and not s.forget_requested for s in actions.publish_down)
    assert set(actions.clear_down) == states.keys() & live | states.keys() - named - due
    waits = states.keys() - live - due - set(actions.clear_down)
    if waits or actions.publish_down:
        assert actions.wake_s is not None and actions.wake_s > 0
        assert actions.wake_s <= min([states[n].down_since_s + AFTER_S - NOW_S for n in waits], default=AFTER_S)
    else:
        assert actions.wake_s is None, "a cluster in which everybody is there is not looked at again"


@given(SETS, SETS, st.dictionaries(NODES, st.floats(0, 1000)))
def test_what_was_done_needs_no_doing_again(
    named: frozenset[str], live: frozenset[str], facts: dict[str, float]
) -> None:
    states = {n: NodeState(node=n, down_since_s=s) for n, s in facts.items()}
    once = plan_retirement(named, live, states, NOW_S, AFTER_S)
    gone = {s.node for s in once.retire}
    after = {n: s for n, s in states.items() if n not in {*once.clear_down, *gone}} | {
        s.node: s for s in once.publish_down
    }
    again = plan_retirement(named - gone, live, after, NOW_S, AFTER_S)
    assert (again.publish_down, again.clear_down, again.retire) == ([], [], [])


def test_the_keys_that_name_a_node_are_found_and_no_others() -> None:
    stage = StageState(instance="i", rank=1, node="a", epoch=1, phase="ready")
    spread = InstanceSpec(
        id="i",
        repo="org/m",
        commit="c",
        context_tokens=1,
        stages=[StageSpec(rank=r, node=n, first_layer=r, last_layer=r + 1) for r, n in enumerate("ba")],
    )
    of_a = [storage_key("a"), model_key("a", ModelId("org/m@c")), shard_key("a", ModelId("org/m@c")), links_key("a")]
    of_a.append(download_key("a", "org/m"))
    others = [
        "node.a",
        "instance.a",
        storage_key("ab"),
        model_key("b", ModelId("a/a@a")),
        "download",
        "leader.placement",
    ]
    spec_keys = [download_key("a", "org/m"), download_key("b", "a/a"), "instance.i"]
    found = keys_by_node(spec_keys, of_a + others, [spread], [(stage_key("i", 1), stage)])
    assert found.keys() == {"a", "b", "ab", ""}
    assert found["a"].spec == [download_key("a", "org/m")]
    assert sorted(found["a"].state) == sorted([*of_a, stage_key("i", 1)])
    assert found["a"].instances == found["b"].instances == ["i"] and found["ab"].instances == []
