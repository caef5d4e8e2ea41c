"""The placement service as a cluster uses it: real processes, real NATS, nodes that are only keys."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from shoal_common.bus.keys import instance_key
from shoal_common.bus.streams import LEASE_TTL_S
from shoal_common.errors import NoMemory, NotFound
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.instances import StageSpec
from shoal_common.messages.placement import PlaceCommand, Unplace
from shoal_common.rpc.request_reply import RpcClient
from tests.harness.delayed_nats_proxy import delayed_nats_proxy
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.placement.placement_cluster import COMMIT, FOLLOW_DEADLINE_S, INSTANCE_MIB, MODEL, cluster_of


async def test_an_instance_is_placed_starts_runs_degrades_and_ends(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"):
        await asyncio.gather(c.beat("a", 400), c.beat("b", 400), c.hold("a"))
        outcome = await c.ask("place", PlaceCommand(model=MODEL))
        assert outcome.ok, outcome.error
        spec = await c.spec(outcome.result["instance"])
        assert spec is not None
        assert spec.id.startswith("tiny-fish-")
        assert (spec.model, spec.context_tokens, len(spec.stages)) == (f"{MODEL}@{COMMIT}", 4096, 2)
        assert outcome.result["context_tokens"] == 4096
        assert [StageSpec(**s) for s in outcome.result["stages"]] == spec.stages
        assert (await c.wait_phase(spec.id, "starting")).nodes == [s.node for s in spec.stages]

        await c.stage(spec, 0, "ready")
        await c.stage(spec, 1, "ready")
        await c.wait_phase(spec.id, "ready")
        await c.die(spec.stages[1].node)
        await c.wait_phase(spec.id, "degraded")
        await c.beat(spec.stages[1].node, 400)
        await c.wait_phase(spec.id, "ready")

        stopping = asyncio.create_task(c.ask("unplace", Unplace(instance=spec.id)))

        async def withdrawn() -> bool:
            return await c.spec(spec.id) is None

        await eventually(withdrawn, "the spec is withdrawn")
        await c.unstage(spec, 0)
        await c.unstage(spec, 1)
        assert (await stopping).ok

        async def forgotten() -> bool:
            return await c.state(spec.id) is None

        await eventually(forgotten, "the state goes with the spec")


async def test_another_major_versions_nodes_are_not_used_by_placement(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1") as process:
        await asyncio.gather(
            c.beat("a", 5 * INSTANCE_MIB, version="99.0.0"), c.beat("b", 5 * INSTANCE_MIB), c.hold("a")
        )
        refused = await c.ask("place", PlaceCommand(model=MODEL))
        assert refused.error is not None and refused.error.code == "not_found"
        await c.hold("b")
        placed = await c.ask("place", PlaceCommand(model=MODEL))
        assert [s["node"] for s in placed.result["stages"]] == ["b"]
        await c.beat("a", 5 * INSTANCE_MIB, version="99.0.0")
        named = await c.ask("place", PlaceCommand(model=MODEL, nodes=["a"]))
        assert named.error is not None and named.error.code == "not_found"
        warnings = [line for line in process.lines if "ignoring a node that runs another major version" in line]
        assert len(warnings) == 1 and "other_node=a" in warnings[0] and "99.0.0" in warnings[0]


async def test_I5_unplacing_what_is_not_there_succeeds_without_a_write(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"):
        await c.placed_nothing()  # a leader is elected and has written its marker
        before = await c.here.last_sequence("KV_spec")
        assert (await c.ask("unplace", Unplace(instance="never-was"))).ok
        assert (await c.ask("unplace", Unplace(instance="never-was"))).ok
        assert await c.here.last_sequence("KV_spec") == before


async def test_I5_a_command_delivered_twice_places_one_instance(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"):
        await asyncio.gather(c.beat("a", 5 * INSTANCE_MIB), c.hold("a"))
        command = PlaceCommand(model=MODEL, id="the-same")
        await c.send("place", command)
        first = await c.outcome("the-same")
        # As if the leader had died before it published the outcome: the command is delivered again.
        await c.here.buckets.done.delete("the-same")
        await c.send("place", command)
        second = await c.outcome("the-same")
        assert first.ok and second.ok
        assert first.result == second.result
        assert [s.id for s in await c.specs()] == [first.result["instance"]]


async def test_refusals_have_a_reason_and_a_remedy(own_nats: NatsServer, tmp_path: Path) -> None:
    async def refused(command: PlaceCommand) -> tuple[str, Outcome]:
        outcome = await c.ask("place", command)
        assert not outcome.ok and outcome.error is not None
        return outcome.error.code, outcome

    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"):
        await c.beat("a", 100)
        code, outcome = await refused(PlaceCommand(model=MODEL))
        assert code == "not_found" and f"shoal pull {MODEL}" in str(outcome.error)
        await c.hold("a", None, "it has no config.json")
        code, outcome = await refused(PlaceCommand(model=MODEL))
        assert code == "unsupported" and "it has no config.json" in str(outcome.error)
        await c.hold("a")
        code, outcome = await refused(PlaceCommand(model=MODEL))
        assert code == "no_room" and outcome.error is not None
        (figures,) = outcome.error.details["nodes"]
        assert figures["node"] == "a" and figures["available_bytes"] == 100 << 20
        assert figures["total_bytes"] == 200 << 20 and figures["needed_bytes"] > figures["available_bytes"]
        code, _ = await refused(PlaceCommand(model="../../etc"))
        assert code == "bad_name"
        assert await c.specs() == []


async def test_of_ten_placed_at_once_as_many_are_as_fit(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"), c.placement("p-2"):
        await asyncio.gather(c.beat("a", INSTANCE_MIB), c.beat("b", 2 * INSTANCE_MIB + 50), c.hold("a"))
        outcomes = await asyncio.gather(*(c.ask("place", PlaceCommand(model=MODEL, max_nodes=1)) for _ in range(10)))
        won = {o.result["instance"] for o in outcomes if o.ok}
        assert len(won) == 3
        assert all(o.error is not None and o.error.code == "no_room" for o in outcomes if not o.ok)
        specs = await c.specs()
        assert {s.id for s in specs} == won
        assert sorted(s.stages[0].node for s in specs) == ["a", "b", "b"]
        # Once one is stopped, its memory is free for the next.
        assert (await c.ask("unplace", Unplace(instance=specs[0].id))).ok
        assert (await c.ask("place", PlaceCommand(model=MODEL, max_nodes=1))).ok


async def test_a_preview_is_what_place_would_do_and_writes_nothing(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"), c.placement("p-2"):
        await asyncio.gather(c.beat("a", 400), c.beat("b", 500))
        await c.placed_nothing()  # the leader has seen which nodes are live before it sees what they hold
        await c.hold("b")
        await c.has_joined("b")
        ask = RpcClient(c.here.nats)
        before = [await c.here.last_sequence(f"KV_{bucket}") for bucket in ("spec", "state")]
        seen = [
            await ask("placement", node, "preview", PlaceCommand(model=MODEL), dict[str, object])
            for node in ("p-1", "p-2")
        ]
        assert seen[0] == seen[1]
        assert [await c.here.last_sequence(f"KV_{bucket}") for bucket in ("spec", "state")] == before
        outcome = await c.ask("place", PlaceCommand(model=MODEL))
        assert outcome.result["stages"] == seen[0]["stages"]
        with pytest.raises(NoMemory) as refusal:
            await ask("placement", "p-2", "preview", PlaceCommand(model=MODEL), dict[str, object])
        assert {n["node"] for n in refusal.value.details["nodes"]} == {"a", "b"}


async def test_I6_when_the_leader_is_killed_another_leads(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, AsyncExitStack() as stack:
        processes = {n: await stack.enter_async_context(c.placement(n)) for n in ("p-1", "p-2", "p-3")}
        await asyncio.gather(c.beat("a", 2 * INSTANCE_MIB), c.hold("a"))
        first = await c.placed()
        await c.wait_phase(first.id, "starting")
        leader = await c.leader()
        await processes[leader].kill()
        # Nobody leads: the queue keeps them.
        wanted = [asyncio.create_task(c.ask("place", PlaceCommand(model=MODEL, id=f"after-{i}"))) for i in range(2)]
        await c.stage(first, 0, "ready")
        outcomes = await asyncio.gather(*wanted)
        assert await c.leader() != leader
        # The dead leader's reservation still counts: one more fits, two do not.
        assert sorted(o.ok for o in outcomes) == [False, True]
        assert {s.id for s in await c.specs()} == {first.id, *(o.result["instance"] for o in outcomes if o.ok)}
        await c.wait_phase(first.id, "ready")
        assert sum("msg=leading" in line for p in processes.values() for line in p.lines) == 2


async def test_a_leader_that_stops_hands_over_at_once(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, AsyncExitStack() as stack:
        processes = {n: await stack.enter_async_context(c.placement(n)) for n in ("p-1", "p-2")}
        leader = await c.leader()
        (other,) = processes.keys() - {leader}
        processes[leader].send(signal.SIGTERM)
        assert await processes[leader].wait_exit() == 0, processes[leader].output
        await processes[other].wait_line("msg=leading", deadline_s=LEASE_TTL_S - 1)
        await asyncio.gather(c.beat("a", INSTANCE_MIB), c.hold("a"))
        await c.placed()


async def test_a_leader_that_stops_hands_over_a_slow_network(own_nats: NatsServer, tmp_path: Path) -> None:
    async with (
        cluster_of(own_nats, tmp_path) as c,
        delayed_nats_proxy(own_nats.url) as network,
        c.placement("p-1", SHOAL_NATS=network.url) as first,
    ):
        await first.wait_line("msg=leading")
        async with c.placement("p-2") as second:
            network.flows.clear()
            first.send(signal.SIGTERM)
            await eventually(lambda: network.holds(b"leader.placement"), "the first asks for its lease")
            await asyncio.sleep(1.0)  # the network's delay
            stopped_s = asyncio.get_running_loop().time()
            network.flows.set()
            await second.wait_line("msg=leading")
            assert asyncio.get_running_loop().time() - stopped_s < LEASE_TTL_S / 2
            assert await first.wait_exit() == 0


async def test_a_leader_that_was_paused_past_its_lease_leads_no_more(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, AsyncExitStack() as stack:
        processes = {n: await stack.enter_async_context(c.placement(n)) for n in ("p-1", "p-2")}
        leader = await c.leader()
        (other,) = processes.keys() - {leader}
        processes[leader].send(signal.SIGSTOP)
        await processes[other].wait_line("msg=leading")
        processes[leader].send(signal.SIGCONT)
        await processes[leader].wait_line("no longer leading")
        await asyncio.gather(c.beat("a", INSTANCE_MIB), c.hold("a"))
        outcomes = await asyncio.gather(*(c.ask("place", PlaceCommand(model=MODEL)) for _ in range(4)))
        assert sum(o.ok for o in outcomes) == 1
        assert {o.node for o in outcomes} == {other}


async def test_a_late_write_of_a_former_leader_is_refused(own_nats: NatsServer, tmp_path: Path) -> None:
    async with (
        cluster_of(own_nats, tmp_path) as c,
        delayed_nats_proxy(own_nats.url) as way,
        c.placement("p-1", SHOAL_NATS=way.url) as first,
    ):
        await first.wait_line("msg=leading")
        async with c.placement("p-2") as second:
            await asyncio.gather(c.beat("a", 3 * INSTANCE_MIB), c.hold("a"))
            spec = await c.placed()
            await c.stage(spec, 0, "ready")
            await c.wait_phase(spec.id, "ready")
            way.flows.clear()
            await c.stage(spec, 0, "failed")
            await eventually(lambda: way.holds(b'"degraded"'), "what the first says is on its way", FOLLOW_DEADLINE_S)
            await second.wait_line("msg=leading")
            await c.wait_phase(spec.id, "degraded")
            await c.stage(spec, 0, "ready")
            await c.beat("a", 3 * INSTANCE_MIB)
            await c.wait_phase(spec.id, "ready")
            written = [await c.here.last_sequence(s) for s in ("KV_spec", "KV_state", "EVT")]
            way.flows.set()
            # The answer uses the same connection, after all that was delayed.
            with pytest.raises(NotFound):
                question = PlaceCommand(model="org/nothing")
                await RpcClient(c.here.nats)(
                    "placement", "p-1", "preview", question, dict[str, object], restart_wait_s=10
                )
            assert [await c.here.last_sequence(s) for s in ("KV_spec", "KV_state", "EVT")] == written
            state = await c.state(spec.id)
            assert state is not None and state.phase == "ready"


async def test_placement_goes_on_after_nats_is_killed(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1") as process:
        await asyncio.gather(c.beat("a", 3 * INSTANCE_MIB), c.hold("a"))
        first = await c.placed()
        own_nats.restart()
        await c.here.nats.reconnects.wait_after(0)
        second = await c.placed()
        assert {s.id for s in await c.specs()} == {first.id, second.id}
        assert process.running


async def test_an_idle_leader_writes_nothing(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"), c.placement("p-2"):
        await asyncio.gather(c.beat("a", 3 * INSTANCE_MIB), c.hold("a"))
        spec = await c.placed()
        await c.stage(spec, 0, "ready")
        await c.wait_phase(spec.id, "ready")
        await c.has_joined("a")
        before = [await c.here.last_sequence(s) for s in ("KV_spec", "KV_state", "CMD", "EVT")]
        for memory_mib in range(3 * INSTANCE_MIB, 3 * INSTANCE_MIB - 10, -1):
            await c.beat("a", memory_mib)  # facts change at every beat, the instance's state does not
        marker = await c.placed(PlaceCommand(model=MODEL, id="after"))  # decided after all those beats
        await c.wait_phase(marker.id, "starting")
        after = [await c.here.last_sequence(s) for s in ("KV_spec", "KV_state", "CMD", "EVT")]
        # One spec, one state, one command, one event: those of the marker instance.
        assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1, 1]


async def test_a_spec_that_vanished_without_a_leader_loses_its_state(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c:
        async with c.placement("p-1") as first:
            await asyncio.gather(c.beat("a", INSTANCE_MIB), c.hold("a"))
            spec = await c.placed()
            await c.wait_phase(spec.id, "starting")
            first.send(signal.SIGTERM)
            await first.wait_exit()
        await c.here.buckets.spec.delete(instance_key(spec.id))
        async with c.placement("p-1"):

            async def forgotten() -> bool:
                return await c.state(spec.id) is None

            await eventually(forgotten, "the state goes", FOLLOW_DEADLINE_S)
