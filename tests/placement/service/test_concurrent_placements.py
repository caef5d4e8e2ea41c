"""Many placements at once, of which a few fit in memory, whichever leader carries them out or dies meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.messages.envelope import Outcome
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.placement import PlaceCommand
from shoal_common.messages.storage import ModelState
from shoal_placement.planning.memory_model import reserved_bytes
from tests.harness.delayed_nats_proxy import delayed_nats_proxy
from tests.harness.nats import NatsServer, joined
from tests.placement.placement_cluster import COMMIT, INSTANCE_MIB, MIB, MODEL, SHAPE, Cluster, cluster_of

CONCURRENT, HOLDS, CONNECTIONS = 50, 5, 5
MEMORY_MIB = {"a": 2 * INSTANCE_MIB + 50, "b": 3 * INSTANCE_MIB + 50}
"""Enough for two and for three instances; nothing fits in 50 MiB."""
BEAT_S = 5.0


@asynccontextmanager
async def nodes_of(c: Cluster) -> AsyncIterator[None]:
    """Keep the nodes' liveness keys alive while the body runs."""

    async def beat() -> None:
        await asyncio.gather(*(c.beat(node, memory_mib) for node, memory_mib in MEMORY_MIB.items()))

    async def beat_on() -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await beat()

    await asyncio.gather(beat(), c.hold("a"))
    beating = asyncio.create_task(beat_on())
    try:
        yield
    finally:
        beating.cancel()


async def place_concurrently(c: Cluster) -> list[Outcome]:
    """Return the outcomes of commands that are all sent at the same time, over several connections."""
    async with AsyncExitStack() as stack:
        here = [await stack.enter_async_context(joined(c.server)) for _ in range(CONNECTIONS)]
        senders = [Cluster(c.server, j, c.directory) for j in here]
        return await asyncio.gather(
            *(
                senders[i % CONNECTIONS].ask("place", PlaceCommand(model=MODEL, id=f"one-{i}"))
                for i in range(CONCURRENT)
            )
        )


async def check(c: Cluster, outcomes: list[Outcome]) -> None:
    """Check that as many were placed as fit, no node has more reserved than memory, and refusals say why."""
    assert len(outcomes) == CONCURRENT
    won = [o.result["instance"] for o in outcomes if o.ok]
    specs = await c.specs()
    assert len(won) == HOLDS and {s.id for s in specs} == set(won)
    model = ModelState(node="a", repo=MODEL, commit=COMMIT, size_bytes=1, file_count=1, shape=SHAPE)
    reserved = reserved_bytes(specs, [model], {node: NodeFacts() for node in MEMORY_MIB})
    for node, memory_mib in MEMORY_MIB.items():
        assert sum(reserved[node].values()) <= memory_mib * MIB
    for outcome in outcomes:
        if outcome.ok:
            continue
        assert outcome.error is not None and outcome.error.code == "no_room", outcome
        figures = {n["node"]: n for n in outcome.error.details["nodes"]}
        assert figures.keys() == MEMORY_MIB.keys()
        for node, own in figures.items():
            assert own["total_bytes"] == 2 * MEMORY_MIB[node] * MIB
        whole = outcome.error.details["needed_bytes"]
        assert whole > outcome.error.details["available_bytes"] == sum(n["available_bytes"] for n in figures.values())
        assert all(n["needed_bytes"] > n["available_bytes"] for n in figures.values())


async def test_of_fifty_placed_at_once_exactly_those_that_fit_run(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, nodes_of(c), c.placement("p-1"), c.placement("p-2"):
        before = await c.here.last_sequence("KV_done")
        await check(c, await place_concurrently(c))
        assert await c.here.last_sequence("KV_done") == before + CONCURRENT, "each has one outcome"


@pytest.mark.parametrize("lost", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "paused past its lease"])
async def test_I6_a_leader_lost_among_fifty_placements_changes_nothing(
    own_nats: NatsServer, tmp_path: Path, lost: signal.Signals
) -> None:
    async with (
        cluster_of(own_nats, tmp_path) as c,
        nodes_of(c),
        delayed_nats_proxy(own_nats.url) as way,
        c.placement("p-1", SHOAL_NATS=way.url) as first,
    ):
        await first.wait_line("msg=leading")
        async with c.placement("p-2") as second:
            before, placed = await c.here.last_sequence("KV_done"), 0

            def kill_leader(data: bytes) -> None:
                """Stop it while its second placement is on the way to NATS, before the acknowledgement arrives."""
                nonlocal placed
                placed += data.count(b"$KV.spec.instance.")
                if placed >= 2:
                    first.send(lost)

            way.on_bytes = kill_leader
            placing = asyncio.create_task(place_concurrently(c))
            await second.wait_line("msg=leading")
            way.on_bytes = lambda _: None
            first.send(signal.SIGCONT)
            outcomes = await placing
            await check(c, outcomes)
            assert await c.here.last_sequence("KV_done") == before + CONCURRENT, "each has one outcome"
            assert {o.node for o in outcomes} >= {"p-2"}
