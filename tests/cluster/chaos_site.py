"""The site of the chaos tests: three nodes on their own network, each with a small disk and a clock that can be set.

Each node's processes run in a network namespace behind a bridge, NATS in another one; the hub and the test itself are
outside, and connect through relays that are never cut. If namespaces or disks cannot be made, nodes use loopback or
the test's disk, with a warning, and the faults that need them are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from shoal_demo.hub_server import RunningHub, running_hub
from tests.fetcher.pull_site import Site
from tests.harness.fake_wall_clock import WrongClock
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer
from tests.harness.networks import Switch, machines, no_networks, port_forward, relayed
from tests.harness.node import Node, running_nodes
from tests.harness.tiny_filesystem import no_small_disks, small_disk

NODES = ("a", "b", "c")
SERVICES = ("storage", "fetcher", "fileserver", "placement")
DISK_BYTES = 48 << 20
HEADROOM_BYTES = 1 << 20
_NATS_PORT = 4222


class ReachedServer(NatsServer):
    """A NATS server in a network namespace; the test uses another address for it than the nodes."""

    outside_url = ""

    def start(self) -> None:
        """Start the server and set its address for the test."""
        super().start()
        self.url = self.outside_url or self.url


class World(msgspec.Struct):
    """What faults can hit. `switch` is None and `disks` empty if it has no network or disks of its own."""

    site: Site
    authority: Authority
    clocks: dict[str, WrongClock]
    switch: Switch | None
    disks: dict[str, Path]


@contextmanager
def running_world(home: Path, harms: set[str]) -> Iterator[World]:
    """Run the world that these kinds of faults need."""
    hub_root = home / "hub"
    hub_root.mkdir(parents=True)
    with ExitStack() as stack:
        hub = stack.enter_context(running_hub(hub_root, process=True))
        networked = "network" in harms and _can("network", no_networks())
        authority = Authority(home)
        server, switch, within, url = (_networked if networked else _on_loopback)(stack, home, hub, authority)
        usual = {"HF_ENDPOINT": hub.base_url, "SHOAL_HEADROOM_BYTES": str(HEADROOM_BYTES)}
        if networked:
            usual |= {"SHOAL_BIND": "0.0.0.0"}  # in a namespace
        nodes = {name: Node(home / name, name, url, SERVICES, **usual) for name in NODES}
        for name, node in nodes.items():
            authority.node(name)
            for service in node.services.values():
                service.within = within.get(name, ())
        disks = {}
        if "full_disk" in harms and _can("full_disk", no_small_disks()):
            for name, node in nodes.items():
                disks[name] = stack.enter_context(small_disk(node.layout.root, DISK_BYTES))
        clocks = {name: WrongClock(node) for name, node in nodes.items()}
        stack.enter_context(running_nodes(*nodes.values()))
        yield World(Site(server, hub, hub_root, nodes, repo="org/chaos"), authority, clocks, switch, disks)


def _can(harm: str, reason: str) -> bool:
    if reason:
        warnings.warn(f"{reason}: chaos of kind {harm} is NOT tested here", stacklevel=3)
    return not reason


Network = tuple[NatsServer, Switch | None, dict[str, tuple[str, ...]], str]
"""NATS, the switch, the command prefix for each node's namespace, and NATS's address inside."""


def _on_loopback(stack: ExitStack, home: Path, _: RunningHub, authority: Authority) -> Network:
    server = stack.enter_context(NatsServer(home / "nats", authority=authority))
    return server, None, {}, server.url


def _networked(stack: ExitStack, home: Path, hub: RunningHub, authority: Authority) -> Network:
    names = (*NODES, "nats")
    bridge, *others = stack.enter_context(machines("bridge", *names))
    switch = Switch(bridge, dict(zip(names, others, strict=True)))
    hub_port = int(hub.base_url.rpartition(":")[2])
    for machine in others:
        stack.enter_context(relayed(machine, hub_port))
    address = switch.addresses["nats"]
    server = ReachedServer(home / "nats", address, _NATS_PORT, others[-1].within, authority=authority)
    server.outside_url = f"nats://127.0.0.1:{stack.enter_context(port_forward(others[-1], address, _NATS_PORT))}"
    stack.enter_context(server)
    return server, switch, {n: m.within for n, m in zip(names, others, strict=True)}, f"nats://{address}:{_NATS_PORT}"
