"""Nodes whose wall clocks are wrong by hours, or set while they run: it makes no difference to the others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from shoal_common.bus.keys import node_key, storage_key
from shoal_common.messages.placement import NodeState
from shoal_common.messages.storage import StorageState
from shoal_demo.hub_server import running_hub
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.harness.fake_wall_clock import WrongClock
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer
from tests.harness.node import Node, running_nodes
from tests.harness.waiting import eventually

HOUR_S = 3600.0
FILES = {"model.safetensors": noise(3 << 20, "wrong clocks"), "config.json": b"{}"}
DEADLINE_S = 45.0


@asynccontextmanager
async def nodes_with(
    server: NatsServer,
    authority: Authority,
    home: Path,
    ahead_s: dict[str, float],
    services: tuple[str, ...],
    **environment: str,
) -> AsyncIterator[tuple[Pulls, dict[str, WrongClock]]]:
    """Run nodes with these clocks."""
    (home / "models").mkdir()
    with running_hub(home / "models", process=True) as hub:
        usual = {"HF_ENDPOINT": hub.base_url, **environment}
        nodes = {name: Node(home / name, name, server.url, services, **usual) for name in ahead_s}
        for name, node in nodes.items():
            authority.node(name, node.home)
        clocks = {name: WrongClock(node) for name, node in nodes.items()}
        for name, off_s in ahead_s.items():
            clocks[name].set(off_s)
        site = Site(server, hub, home / "models", nodes, "org/clocks")
        site.make(FILES)
        with running_nodes(*nodes.values()):
            async with site.join() as here:
                await authority.publish(here.buckets)
                try:
                    for node in nodes.values():
                        await node.ready(here.here)
                    yield here, clocks
                except BaseException:
                    print(*(node.log() for node in nodes.values()), sep="\n")
                    raise


async def test_nodes_with_clocks_half_a_day_apart_work_together(
    own_members_nats: NatsServer, authority: Authority, tmp_path: Path
) -> None:
    apart = {"a": 5 * HOUR_S, "b": -7 * HOUR_S}
    async with nodes_with(own_members_nats, authority, tmp_path, apart, ("storage", "fetcher", "fileserver")) as (
        here,
        clocks,
    ):
        await here.pull_ok("a")
        here.site.hub.reset_stats()
        await here.pull_ok("b")
        await here.assert_complete("b", FILES)
        assert here.site.hub_bytes() == 0, "b took it from a, whose token it has to show"
        for turn, (node, clock) in enumerate(clocks.items()):
            for ahead_s in (20 * HOUR_S, -20 * HOUR_S, 0.0):
                clock.set(ahead_s)  # while it runs
                quota = (1 << 30) + turn
                done = await here.ask(node, "configure", b'{"max_storage_bytes": %d}' % quota, service="storage")
                assert done.ok, done.error
        assert (await here.delete("b")).result["deleted"]
        await here.pull_ok("b")
        assert here.site.hub_bytes() == 0


async def test_a_leader_whose_clock_is_set_retires_nobody_for_it(
    own_members_nats: NatsServer, authority: Authority, tmp_path: Path
) -> None:
    """A clock that jumps by a day does not make a node a day older."""
    leading = nodes_with(own_members_nats, authority, tmp_path, {"a": 0.0}, ("placement",), SHOAL_RETIRE_AFTER="24h")
    async with leading as (here, clocks):
        state = here.buckets.state

        async def stop_node(node: str) -> NodeState:
            await state.put(storage_key(node), StorageState(node=node))
            return await eventually(
                lambda: state.get_as(node_key(node), NodeState), f"{node} is said to be silent", DEADLINE_S
            )

        first = await stop_node("gone-1")
        for number, ahead_s in enumerate((48 * HOUR_S, -48 * HOUR_S, 240 * HOUR_S), 2):
            clocks["a"].set(ahead_s)
            # Each node is published by one pass over all of them; the pass before it has ended by then.
            for again in (0, 1):
                later = await stop_node(f"gone-{number}-{again}")
                assert 0 <= later.down_since_s - first.down_since_s < HOUR_S
            assert await state.get_as(storage_key("gone-1"), StorageState) is not None
