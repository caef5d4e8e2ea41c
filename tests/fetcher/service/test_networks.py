"""Nodes with several real networks: the shared one is tried first, and a dead one costs seconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.bus.keys import liveness_key
from shoal_common.messages.liveness import LivenessRecord, NodeFacts
from shoal_demo.hub_server import RunningHub, running_hub
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site, check_store
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer
from tests.harness.networks import Machine, machines, relayed, wire
from tests.harness.node import Node, running_nodes
from tests.harness.waiting import eventually

SERVICES = ("storage", "fetcher", "fileserver")
FILES = {"model.safetensors": noise(3 << 20, "several networks"), "config.json": b"{}"}
BEATS_S = 40.0
"""Interfaces are refreshed with every heartbeat; a loaded machine may be late."""


@pytest.fixture
def two() -> Iterator[tuple[Machine, Machine]]:
    """Two machines without a network."""
    with machines("a", "b") as (a, b):
        yield a, b


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RunningHub]:
    """This test's hub."""
    (tmp_path / "models").mkdir()
    with running_hub(tmp_path / "models", process=True) as running:
        yield running


@asynccontextmanager
async def nodes_on(
    two: tuple[Machine, Machine],
    server: NatsServer,
    authority: Authority,
    hub: RunningHub,
    home: Path,
    bind: str,
    **more: str,
) -> AsyncIterator[Pulls]:
    """The nodes a and b on these machines, with these variables besides the usual ones, and the model on a."""
    ports = [int(url.rpartition(":")[2]) for url in (server.url, hub.base_url)]
    environment = {"HF_ENDPOINT": hub.base_url, "SHOAL_BIND": bind, **more}
    nodes = [Node(home / name, name, server.url, SERVICES, **environment) for name in "ab"]
    for node, machine in zip(nodes, two, strict=True):
        authority.node(node.id, node.home)
        for service in node.services.values():
            service.within = machine.within
    site = Site(server, hub, home / "models", {n.id: n for n in nodes}, "org/networks")
    site.make(FILES)
    async with AsyncExitStack() as stack:
        for machine in two:
            for port in ports:
                stack.enter_context(relayed(machine, port))
        stack.enter_context(running_nodes(*nodes))
        here = await stack.enter_async_context(site.join())
        await authority.publish(here.buckets)
        try:
            for node in nodes:
                await node.ready(here.here)
            await here.pull_ok("a")
            hub.reset_stats()
            yield here
        except BaseException:
            print(*(node.log() for node in nodes), sep="\n")
            raise
        for node in nodes:
            check_store(node)


async def published(here: Pulls, node: str) -> NodeFacts:
    """Return what a node's fileserver publishes."""
    live = await here.buckets.live.get_as(liveness_key(node, "fileserver"), LivenessRecord)
    assert live is not None
    return live.facts


async def published_hosts(here: Pulls, node: str) -> list[str]:
    """Return the hosts that a node's fileserver publishes, best first."""
    return [address.rpartition(":")[0] for address in (await published(here, node)).addresses]


async def pulled_from_a(here: Pulls) -> None:
    """Pull on b; every byte comes from a."""
    state = await here.pull_ok("b")
    await here.assert_complete("b", FILES)
    assert set(state.sources) == {"a"} and here.site.hub_bytes() == 0


async def test_a_peer_that_has_only_ipv6_pulls_from_a_node_on_all(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan", a, ("10.77.1.1/24", "fd77:1::1/64"), b, ("fd77:1::2/64",))
    async with nodes_on(two, own_members_nats, authority, hub, tmp_path, "::") as here:
        assert await published_hosts(here, "a") == ["10.77.1.1", "[fd77:1::1]"]
        assert await published_hosts(here, "b") == ["[fd77:1::2]"]
        await pulled_from_a(here)


async def test_a_node_that_listens_on_all_of_ipv6_takes_ipv4_too(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan", a, ("10.77.1.1/24", "fd77:1::1/64"), b, ("10.77.1.2/24",))
    async with nodes_on(two, own_members_nats, authority, hub, tmp_path, "::") as here:
        await pulled_from_a(here)


async def test_of_several_networks_the_one_that_both_are_on_is_used(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan1", a, ("10.77.1.1/24",), b, ())
    wire("lan2", a, ("10.77.2.1/24", "fd77:2::1/64"), b, ("10.77.2.2/24",))
    # Packets to the first network are dropped without an answer: a node that tried it first would wait.
    b.ip("route", "add", "default", "via", "10.77.2.99")
    b.ip("neighbour", "replace", "10.77.2.99", "lladdr", "02:00:00:00:00:99", "dev", "lan2", "nud", "permanent")
    async with nodes_on(two, own_members_nats, authority, hub, tmp_path, "0.0.0.0") as here:
        assert await published_hosts(here, "a") == [
            "10.77.1.1",
            "10.77.2.1",
        ]  # IPv4 alone, for it listens on no other
        await pulled_from_a(here)
        assert "sent nothing" not in here.site["b"]["fetcher"].log()


async def test_a_dead_first_address_does_not_stall_a_pull(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan1", a, ("10.77.1.1/24",), b, ("10.77.1.2/24",))
    wire("lan2", a, ("10.77.2.1/24",), b, ("10.77.2.2/24",))
    # Like a broken switch: what b sends to a's first address is dropped, without an error.
    b.ip("neighbour", "replace", "10.77.1.1", "lladdr", "02:00:00:00:00:99", "dev", "lan1", "nud", "permanent")
    async with nodes_on(two, own_members_nats, authority, hub, tmp_path, "0.0.0.0") as here:
        assert await published_hosts(here, "a") == ["10.77.1.1", "10.77.2.1"]
        await pulled_from_a(here)


async def test_network_changes_are_published_without_a_restart(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan1", a, ("10.77.1.1/24",), b, ("10.77.1.2/24",))
    async with nodes_on(two, own_members_nats, authority, hub, tmp_path, "0.0.0.0") as here:
        pid = here.site["a"]["fileserver"].pid

        async def publishes(*hosts: str) -> bool:
            return await published_hosts(here, "a") == list(hosts)

        await eventually(lambda: publishes("10.77.1.1"), "the one network is told")
        wire("lan2", a, ("10.77.2.1/24",), b, ("10.77.2.2/24",))
        await eventually(lambda: publishes("10.77.1.1", "10.77.2.1"), "the second is told", BEATS_S)
        b.ip("link", "set", "lan1", "down")  # the other end, as when somebody pulls the cable: a has no carrier
        await eventually(lambda: publishes("10.77.2.1"), "the first is told no more", BEATS_S)
        assert here.site["a"]["fileserver"].pid == pid
        await pulled_from_a(here)


async def test_loopback_is_for_its_own_machine_and_network_namespace(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan", a, ("10.77.1.1/24",), b, ("10.77.1.2/24",))
    async with nodes_on(two, own_members_nats, authority, hub, tmp_path, "0.0.0.0") as here:
        lives = [await here.buckets.live.get_as(liveness_key(n, "fileserver"), LivenessRecord) for n in "ab"]
        kinds = [[link.kind for link in live.facts.links] for live in lives if live]
        assert kinds == [["virtual", "loopback"], ["virtual", "loopback"]]
        networks = {live.holder.network_namespace for live in lives if live}
        assert len(networks) == 2 and "" not in networks
        local = next(
            link.address for live in lives[:1] if live for link in live.facts.links if link.kind == "loopback"
        )
        # Another server listens on b's loopback at a's port: had b asked it, a source would have failed once.
        with relayed(b, int(local.rpartition(":")[2])):
            await pulled_from_a(here)
        assert "source failed" not in here.site["b"]["fetcher"].log()


@pytest.mark.parametrize("encrypt", ["true", "false"])
async def test_weights_are_encrypted_unless_a_person_says_no(
    two: tuple[Machine, Machine],
    own_members_nats: NatsServer,
    authority: Authority,
    hub: RunningHub,
    tmp_path: Path,
    encrypt: str,
) -> None:
    a, b = two
    wire("lan", a, ("10.77.1.1/24",), b, ("10.77.1.2/24",))
    async with nodes_on(
        two, own_members_nats, authority, hub, tmp_path, "0.0.0.0", SHOAL_ENCRYPT_WEIGHTS=encrypt
    ) as here:
        assert {link.tls for link in (await published(here, "a")).links} == {encrypt == "true"}
        await pulled_from_a(here)


async def test_plain_weights_are_not_taken_where_they_may_not_be(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan", a, ("10.77.1.1/24",), b, ("10.77.1.2/24",))
    async with nodes_on(
        two, own_members_nats, authority, hub, tmp_path, "0.0.0.0", SHOAL_ENCRYPT_WEIGHTS="false"
    ) as here:
        await here.site["b"].restart(here.here, "fetcher", SHOAL_ENCRYPT_WEIGHTS="true")
        state = await here.pull_ok("b")
        assert set(state.sources) == {"hub"}
        assert "node sends weights unencrypted" in here.site["b"]["fetcher"].log()
        assert "source failed" not in here.site["b"]["fetcher"].log()


async def test_a_node_that_serves_no_peers_keeps_nobody_waiting(
    two: tuple[Machine, Machine], own_members_nats: NatsServer, authority: Authority, hub: RunningHub, tmp_path: Path
) -> None:
    a, b = two
    wire("lan", a, ("10.77.1.1/24",), b, ("10.77.1.2/24",))
    async with nodes_on(
        two, own_members_nats, authority, hub, tmp_path, "0.0.0.0", SHOAL_SERVE_PEERS="false"
    ) as here:
        # Both read the hub at the same time: neither waits for the other, nor holds a lease that the other needs.
        assert (await here.delete("a")).result["deleted"]
        states = await asyncio.gather(here.pull_ok("a"), here.pull_ok("b"))
        assert [set(state.sources) for state in states] == [{"hub"}, {"hub"}]
        for node in "ab":
            assert "source failed" not in here.site[node]["fetcher"].log()
