"""Which nodes joined, were lost or returned, and which instances degraded: the decisions, and one real leader."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.bus import subjects
from shoal_common.bus.keys import MEMBERS_KEY
from shoal_common.errors import ErrorBody
from shoal_common.messages.instances import InstanceSpec, InstanceState, StageSpec, StageState
from shoal_common.messages.placement import Forget, MembersState, PlaceCommand
from shoal_placement.leader.instance_status import (
    has_become_degraded,
    instance_status,
    is_explained,
    stages_not_ready,
)
from shoal_placement.leader.membership import answering_nodes, compare_members
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.placement.placement_cluster import COMMIT, FOLLOW_DEADLINE_S, INSTANCE_MIB, MODEL, Cluster, cluster_of

NOW_S = 500.0
names = st.sampled_from("abcd")


def members(**lost_since_s: float) -> MembersState:
    return MembersState(lost_since_s=lost_since_s)


def test_a_node_joins_once_it_is_live_and_has_published_state() -> None:
    assert compare_members(members(), set(), {"a"}, NOW_S).joined == []
    assert compare_members(members(), {"a"}, set(), NOW_S).joined == []
    changes = compare_members(members(), {"a"}, {"a"}, NOW_S)
    assert (changes.joined, changes.lost, changes.returned) == (["a"], [], [])
    assert changes.members == members(a=0.0)


def test_a_node_that_is_not_live_is_lost_and_returns_when_it_is() -> None:
    lost = compare_members(members(a=0.0, b=0.0), {"a", "b"}, {"a"}, NOW_S)
    assert (lost.joined, lost.lost, lost.returned) == ([], ["b"], [])
    assert lost.members == members(a=0.0, b=NOW_S)
    returned = compare_members(lost.members, {"a", "b"}, {"a", "b"}, NOW_S + 1)
    assert (returned.joined, returned.lost, returned.returned) == ([], [], ["b"])
    assert returned.members == members(a=0.0, b=0.0)


def test_a_retired_node_is_dropped_and_joins_again() -> None:
    retired = compare_members(members(a=0.0, b=NOW_S), {"a"}, {"a"}, NOW_S)
    assert (retired.joined, retired.lost, retired.returned) == ([], [], [])
    assert retired.members == members(a=0.0)
    assert compare_members(retired.members, {"a", "b"}, {"a", "b"}, NOW_S).joined == ["b"]


@given(st.dictionaries(names, st.sampled_from([0.0, 7.0])), st.sets(names), st.sets(names))
def test_each_change_is_reported_once(record: dict[str, float], named: set[str], live: set[str]) -> None:
    first = compare_members(MembersState(lost_since_s=record), named, live, NOW_S)
    reported = [*first.joined, *first.lost, *first.returned]
    assert len(reported) == len(set(reported))
    again = compare_members(first.members, named, live, NOW_S + 1)
    assert (again.joined, again.lost, again.returned) == ([], [], [])
    assert again.members == first.members


def test_a_node_answers_while_one_of_its_services_does() -> None:
    live = {"a.storage", "a.gateway", "b.storage"}
    assert answering_nodes(live, set()) == {"a", "b"}
    assert answering_nodes(live, {"a.storage", "b.storage"}) == {"a"}


STAGES = [StageSpec(rank=r, node=n, first_layer=r, last_layer=r + 1) for r, n in enumerate("abc")]
SPEC = InstanceSpec(id="i", repo=MODEL, commit=COMMIT, stages=STAGES, context_tokens=64, epoch=2)


def state(rank: int, phase: Any, message: str = "") -> StageState:
    error = ErrorBody(code="failed", message=message) if message else None
    return StageState(instance="i", rank=rank, node="abc"[rank], epoch=2, phase=phase, error=error)


def test_an_instance_degrades_again_only_after_it_was_ready() -> None:
    def after(before: InstanceState | None, *live: str) -> InstanceState:
        return instance_status(SPEC, [state(r, "ready") for r in range(3)], live, before)

    ready = after(None, "a", "b", "c")
    degraded = after(ready, "a", "c")
    assert not has_become_degraded(None, ready)
    assert has_become_degraded(ready, degraded)
    assert not has_become_degraded(degraded, after(degraded, "a"))
    recovered = after(degraded, "a", "b", "c")
    assert not has_become_degraded(degraded, recovered)
    assert has_become_degraded(recovered, after(recovered, "b"))


def test_each_stage_that_is_not_ready_has_its_reason() -> None:
    stages = [state(0, "ready"), state(1, "failed", "out of memory")]
    missing = stages_not_ready(SPEC, stages, {"b", "c"})
    assert [(stage.rank, reason) for stage, reason in missing] == [
        (0, "node a is down"),
        (1, "rank 1 on b is failed: out of memory"),
        (2, "rank 2 does not run on c"),
    ]
    assert stages_not_ready(SPEC, [state(r, "ready") for r in range(3)], {"a", "b", "c"}) == []


def test_a_stage_that_lost_its_neighbour_explains_nothing() -> None:
    linking, ready = state(0, "linking", "the connection to stage 1 on node b is lost"), state(1, "ready")
    stages = [linking, ready, state(2, "ready")]
    assert not is_explained(stages_not_ready(SPEC, stages, {"a", "b", "c"}), stages)
    assert is_explained(stages_not_ready(SPEC, stages, {"a", "c"}), stages)
    assert is_explained(stages_not_ready(SPEC, stages, {"b", "c"}), stages), "a itself is down"
    stages[1] = state(1, "failed", "out of memory")
    assert is_explained(stages_not_ready(SPEC, stages, {"a", "b", "c"}), stages)


@asynccontextmanager
async def events_of(c: Cluster, *wanted: str) -> AsyncIterator[list[tuple[str, dict[str, Any]]]]:
    """The events of placement with these names, as they come."""
    received: list[tuple[str, dict[str, Any]]] = []

    async def on_event(message: Any) -> None:
        name = message.subject.rpartition(".")[2]
        if name in wanted:
            received.append((name, json.loads(message.data)))

    subscription = await c.here.client.subscribe(f"{subjects.ROOT}.evt.placement.>", cb=on_event)
    await c.here.client.flush()
    yield received
    await subscription.unsubscribe()


async def test_nodes_that_come_and_go_are_events_once_whoever_leads(own_nats: NatsServer, tmp_path: Path) -> None:
    wanted = ("node_joined", "node_lost", "node_returned", "instance_degraded", "retired")
    async with cluster_of(own_nats, tmp_path) as c, events_of(c, *wanted) as received:

        async def until_received(count: int) -> list[tuple[str, str]]:
            async def so_many() -> bool:
                await c.here.client.flush()
                return len(received) >= count

            await eventually(so_many, f"{count} events", FOLLOW_DEADLINE_S)
            return [
                (name, str(body.get("node", body.get("instance", body.get("retired"))))) for name, body in received
            ]

        async with c.placement("p-1") as first:
            await asyncio.gather(c.beat("b", 2 * INSTANCE_MIB), c.hold("b"))
            assert await until_received(1) == [("node_joined", "b")]
            assert await first.wait_line('msg="node joined"', "name=b")
            spec = await c.placed(PlaceCommand(model=MODEL, nodes=["b"]))
            await c.stage(spec, 0, "ready")
            await c.wait_phase(spec.id, "ready")
            await c.die("b")
            seen = await until_received(3)
            assert sorted(seen[1:]) == [("instance_degraded", spec.id), ("node_lost", "b")]
            assert await first.wait_line('msg="node lost"', "level=warning", "name=b")
            assert await first.wait_line('msg="instance degraded"', f"instance={spec.id}", "node b is down")
            by_name = dict(received)
            assert by_name["node_lost"]["since_s"] > 0
            degraded = {k: by_name["instance_degraded"][k] for k in ("model", "ranks", "nodes", "reason")}
            assert degraded == {"model": spec.model, "ranks": [0], "nodes": ["b"], "reason": "node b is down"}
        async with c.placement("p-2"):
            # The next leader repeats nothing; what changed while nobody led is not lost.
            await c.placed_nothing()
            await c.beat("b", 2 * INSTANCE_MIB)
            assert (await until_received(4))[3:] == [("node_returned", "b")]
            await c.die("b")
            assert ("node_lost", "b") in (await until_received(6))[4:]
            assert (await c.ask("forget", Forget(node="b"))).ok
            assert (await until_received(7))[6:] == [("retired", "b")]

            async def dropped() -> bool:
                record = await c.here.buckets.state.get_as(MEMBERS_KEY, MembersState)
                return record is not None and "b" not in record.lost_since_s

            await eventually(dropped, "the record no longer names b")
            await asyncio.gather(c.beat("b", 2 * INSTANCE_MIB), c.hold("b"))
            assert (await until_received(8))[7:] == [("node_joined", "b")]
