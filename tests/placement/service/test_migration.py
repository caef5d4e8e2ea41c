"""Instances that lose a node or have to leave one: real placement processes, nodes that are only keys."""

from __future__ import annotations

import asyncio
from pathlib import Path

from shoal_common.bus.keys import node_key
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.placement import Drain, Forget, NodeSpec, PlaceCommand, Rebalance
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.placement.placement_cluster import FOLLOW_DEADLINE_S, INSTANCE_MIB, MODEL, Cluster, cluster_of

SOON = {"SHOAL_REPLACE_AFTER": "1s"}
LATE = {"SHOAL_REPLACE_AFTER": "1h"}


async def wait_replanned(c: Cluster, before: InstanceSpec) -> InstanceSpec:
    """Return the spec of an instance once it is replanned."""

    async def moved() -> InstanceSpec | None:
        spec = await c.spec(before.id)
        return spec if spec is not None and spec.epoch > before.epoch else None

    return await eventually(moved, f"{before.id} is placed again", FOLLOW_DEADLINE_S)


async def running(c: Cluster, max_nodes: int = 16) -> InstanceSpec:
    """Place an instance and publish that all its stages are ready."""
    spec = await c.placed(PlaceCommand(model=MODEL, max_nodes=max_nodes))
    for stage in spec.stages:
        await c.stage(spec, stage.rank, "ready")
    await c.wait_phase(spec.id, "ready")
    return spec


async def test_an_instance_whose_node_dies_is_replanned_on_the_others(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1", **SOON) as process:
        await asyncio.gather(*(c.beat(n, 400) for n in "abc"), *(c.hold(n) for n in "abc"))
        spec = await running(c)
        dead = spec.stages[1].node
        await c.die(dead)
        fresh = await wait_replanned(c, spec)
        assert fresh.epoch == spec.epoch + 1 and dead not in {s.node for s in fresh.stages}
        assert (fresh.stages[0].first_layer, fresh.stages[-1].last_layer) == (0, 4)
        assert (await c.wait_phase(spec.id, "starting")).epoch == fresh.epoch
        assert await process.wait_line('msg="instance moved"', f"instance={spec.id}", f"{dead} is down")


async def test_an_instance_that_fits_nowhere_stays_with_the_reason(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1", **SOON):
        await asyncio.gather(c.beat("a", 400), c.beat("b", 400), c.hold("a"))
        spec = await running(c)
        await c.die("b")

        async def error_published() -> bool:
            state = await c.state(spec.id)
            return state is not None and state.error is not None and state.error.code == "no_room"

        await eventually(error_published, "it is said that there is no room", FOLLOW_DEADLINE_S)
        await c.wait_phase(spec.id, "degraded")
        assert await c.spec(spec.id) == spec
        await asyncio.gather(c.beat("a", 400), c.beat("c", INSTANCE_MIB))
        fresh = await wait_replanned(c, spec)
        assert "c" in {s.node for s in fresh.stages} and "b" not in {s.node for s in fresh.stages}


async def test_a_node_that_comes_back_in_time_keeps_its_stage(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1", **LATE):
        await asyncio.gather(c.beat("a", 400), c.beat("b", 400), c.beat("c", 400), c.hold("a"))
        spec = await running(c)
        await c.die(spec.stages[1].node)
        await c.wait_phase(spec.id, "degraded")
        await c.beat(spec.stages[1].node, 400)
        await c.wait_phase(spec.id, "ready")
        assert await c.spec(spec.id) == spec


async def test_a_person_need_not_wait_until_a_node_is_replaced(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1", **LATE):
        await asyncio.gather(*(c.beat(n, 400) for n in "abc"), *(c.hold(n) for n in "abc"))
        spec = await running(c)
        gone = spec.stages[1].node
        await c.die(gone)
        degraded = await c.wait_phase(spec.id, "degraded")
        assert degraded.error is not None and f"node {gone} is down" in degraded.error.message
        moved = await c.ask("rebalance", Rebalance(instance=spec.id))
        assert moved.ok and moved.result["moved"]
        fresh = await wait_replanned(c, spec)
        assert gone not in {s.node for s in fresh.stages}


async def test_a_drained_node_is_left_and_gets_no_stage_until_undone(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1", **LATE):
        await asyncio.gather(c.beat("a", INSTANCE_MIB), c.beat("b", INSTANCE_MIB), c.hold("a"), c.hold("b"))
        spec = await running(c, max_nodes=1)
        (here,) = {s.node for s in spec.stages}
        drained = await c.ask("drain", Drain(node=here))
        assert drained.result["was_drained"] is False
        fresh = await wait_replanned(c, spec)
        (there,) = {s.node for s in fresh.stages}
        assert {here, there} == {"a", "b"}
        assert (await c.ask("drain", Drain(node=here))).result["was_drained"] is True

        await asyncio.gather(c.beat("a", INSTANCE_MIB), c.beat("b", INSTANCE_MIB))
        named = await c.ask("place", PlaceCommand(model=MODEL, nodes=[here]))
        assert named.error is not None and named.error.code == "bad_input" and "--undo" in named.error.message
        full = await c.ask("place", PlaceCommand(model=MODEL, max_nodes=1))
        assert full.error is not None and full.error.code == "no_room"
        assert [n["node"] for n in full.error.details["nodes"]] == [there]

        undone = await c.ask("drain", Drain(node=here, drained=False))
        assert undone.result == {"node": here, "drained": False, "was_drained": True, "instances": []}
        assert await c.here.buckets.spec.get(node_key(here)) is None
        placed = await c.placed(PlaceCommand(model=MODEL, max_nodes=1))
        assert {s.node for s in placed.stages} == {here}


async def test_an_unknown_or_forgotten_node_is_not_drained(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"):
        strange = await c.ask("drain", Drain(node="nobody"))
        assert strange.error is not None and strange.error.code == "not_found"
        assert (await c.ask("drain", Drain(node="nobody", drained=False))).result["was_drained"] is False
        await c.beat("a", 400)
        assert (await c.ask("drain", Drain(node="a"))).ok
        assert await c.here.buckets.spec.get_as(node_key("a"), NodeSpec) is not None
        await c.die("a")
        assert (await c.ask("forget", Forget(node="a"))).result["found"]
        assert await c.here.buckets.spec.get(node_key("a")) is None
