"""The leader pings a node to which a connection broke: it counts as down only if it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shoal_common.bus import subjects
from shoal_common.bus.keys import liveness_key
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.liveness.peer_failure import PeerFailureReporter
from shoal_common.messages.envelope import Empty
from shoal_common.messages.placement import PlaceCommand
from shoal_common.rpc.request_reply import PING, RpcClient, serve
from tests.harness.nats import NatsServer, joined
from tests.harness.waiting import eventually
from tests.placement.placement_cluster import FOLLOW_DEADLINE_S, INSTANCE_MIB, MODEL, Cluster, cluster_of


@asynccontextmanager
async def answering(server: NatsServer, node: str) -> AsyncIterator[None]:
    """Answer pings for the inference of a node while the body runs, over a connection of its own."""
    async with joined(server) as own:
        stopping = asyncio.Event()
        serving = asyncio.create_task(serve(own.nats, "inference", node, {}, stopping))
        try:

            async def answers() -> bool:
                return (
                    await RpcClient(own.nats)("inference", node, PING, Empty(), Empty, restart_wait_s=10) == Empty()
                )

            await eventually(answers, "it answers")
            yield
        finally:
            stopping.set()
            await cancel_and_wait(serving)


async def keep_beating(c: Cluster, *nodes: str) -> None:
    """Renew the nodes' liveness keys until cancelled."""
    while True:
        for node in nodes:
            await c.beat(node, 2 * INSTANCE_MIB)
        await asyncio.sleep(1)


async def running_on_b(c: Cluster) -> str:
    """Place an instance on node b, and return its id once it is ready."""
    await asyncio.gather(c.beat("b", 2 * INSTANCE_MIB), c.hold("b"))
    spec = await c.placed(PlaceCommand(model=MODEL, nodes=["b"]))
    await c.stage(spec, 0, "ready")
    await c.wait_phase(spec.id, "ready")
    return spec.id


async def test_a_node_without_answers_is_down_before_its_key_expires(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"):
        beating = asyncio.create_task(keep_beating(c, "a", "b"))
        instance = await running_on_b(c)
        await c.hold("a")
        await PeerFailureReporter(c.here.nats, "a").report("b", "the connection was closed")
        await c.wait_phase(instance, "degraded")
        assert await c.here.buckets.live.get(liveness_key("b", "inference")) is not None
        refused = await c.ask("place", PlaceCommand(model=MODEL, nodes=["b"]))
        assert refused.error is not None and "no inference service is live on b" in refused.error.message
        elsewhere = await c.placed(PlaceCommand(model=MODEL, max_nodes=1))
        assert [s.node for s in elsewhere.stages] == ["a"]
        async with answering(own_nats, "b"):
            await c.wait_phase(instance, "ready")
            assert (await c.ask("place", PlaceCommand(model=MODEL, nodes=["b"]))).ok
        await cancel_and_wait(beating)


async def test_a_node_that_answers_is_not_suspected_despite_reports(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1"), answering(own_nats, "b"):
        instance = await running_on_b(c)
        asked = await c.here.client.subscribe(subjects.rpc("inference", "b", PING))
        written = await c.here.last_sequence("KV_state")
        await PeerFailureReporter(c.here.nats, "a").report("b", "the connection was closed")
        await asked.next_msg(timeout=FOLLOW_DEADLINE_S)
        await PeerFailureReporter(c.here.nats, "c").report("b", "again")
        await asked.next_msg(timeout=FOLLOW_DEADLINE_S)  # the first answer has been evaluated by now
        await c.wait_phase(instance, "ready")
        assert await c.here.last_sequence("KV_state") == written, "nothing was said of it meanwhile"
        await c.here.client.publish(subjects.peer_lost("*").replace("*", "NO-NODE"), b"x")
        await c.here.client.publish(subjects.peer_lost("unknown"), b"")
        assert (await c.ask("place", PlaceCommand(model=MODEL, nodes=["b"]))).ok


async def test_a_key_that_expired_in_an_outage_degrades_nothing(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1") as process:
        instance = await running_on_b(c)
        await asyncio.gather(c.beat("a", 2 * INSTANCE_MIB), c.hold("a"))
        seen = c.here.nats.reconnects.count
        own_nats.restart()
        await c.here.nats.reconnects.wait_after(seen)
        await process.wait_line("reconnected to NATS")
        await c.die("b")  # as if its key had expired while NATS was down
        await c.beat("a", 2 * INSTANCE_MIB)
        marker = await c.placed(PlaceCommand(model=MODEL, nodes=["a"]))  # decided after that was seen
        await c.wait_phase(marker.id, "starting")
        state = await c.state(instance)
        assert state is not None and state.phase == "ready"
        await c.wait_phase(instance, "degraded")  # it had its time and did not renew its key
        assert process.running


async def test_the_next_leader_asks_too(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, c.placement("p-1") as first, c.placement("p-2"):
        beating = asyncio.create_task(keep_beating(c, "b"))
        instance = await running_on_b(c)
        if await c.leader() == "p-1":
            await first.kill()

            async def other() -> bool:
                return await c.leader() == "p-2"

            await eventually(other, "the other leads", FOLLOW_DEADLINE_S)
        reporter = PeerFailureReporter(c.here.nats, "a")

        async def degraded() -> bool:
            await reporter.report(
                "b", "the connection was closed"
            )  # published repeatedly: nobody may be subscribed yet
            state = await c.state(instance)
            return state is not None and state.phase == "degraded"

        await eventually(degraded, "the silence is seen", FOLLOW_DEADLINE_S)
        assert await c.here.buckets.live.get(liveness_key("b", "inference")) is not None
        await cancel_and_wait(beating)
