"""How a node is found down, and when it is not. The order of events; bench/cluster.py measures the seconds."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from shoal_common.bus.keys import instance_key, liveness_key
from shoal_common.bus.subjects import ANY
from shoal_common.errors import NotFound
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.instances import InstanceState
from shoal_common.messages.placement import PlaceCommand
from shoal_common.rpc.command_client import CommandClient, new_command_id
from shoal_common.rpc.request_reply import RpcClient
from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.hub_server import running_hub
from tests.fetcher.pull_site import Pulls, Site
from tests.harness.nats import NatsServer
from tests.harness.node import Node, running_nodes
from tests.harness.waiting import eventually

SERVICES = ("storage", "fetcher", "fileserver", "placement", "inference")
DEADLINE_S = 90.0
OUTAGE_S = 10.0
"""How long NATS is down."""


class Deaths:
    """Two nodes that run an instance together."""

    def __init__(self, site: Site, here: Pulls) -> None:
        self.site, self.here, self.instance = site, here, ""
        self.observed: list[str] = []
        """What was published of instances and nodes, in order: `ready`, `degraded`, `node b`, `event retired`."""

    async def listen(self) -> None:
        """Record what is published from now on."""

        async def state(message: Any) -> None:
            kind, _, rest = message.subject.removeprefix("$KV.state.").partition(".")
            if kind == "node":
                self.observed.append(f"node {rest}")
            elif kind == "instance" and message.data:
                self.observed.append(json.loads(message.data)["phase"])

        async def event(message: Any) -> None:
            self.observed.append(f"event {message.subject.rpartition('.')[2]}")

        await self.here.here.client.subscribe("$KV.state.>", cb=state)
        await self.here.here.client.subscribe("shoal.v1.evt.placement.>", cb=event)
        await self.here.here.client.flush()

    async def place(self, *nodes: str) -> Outcome:
        """Place the demo's model on these nodes."""
        command = PlaceCommand(model=DEMO_MODEL, nodes=list(nodes), min_nodes=len(nodes), context_tokens=256)
        sender = CommandClient(self.here.here.nats, self.here.buckets)
        return await sender.send("placement", ANY, "place", command, new_command_id(), DEADLINE_S)

    async def wait_phase(self, phase: str) -> None:
        """Return once the instance is in this phase."""

        async def reached() -> bool:
            state = await self.here.buckets.state.get_as(instance_key(self.instance), InstanceState)
            return state is not None and state.phase == phase

        await eventually(reached, f"the instance is {phase}", DEADLINE_S)

    async def is_named_with_a_time(self) -> bool:
        """Return whether the error of the instance says since when b is down."""
        state = await self.here.buckets.state.get_as(instance_key(self.instance), InstanceState)
        assert state is not None
        if state.error is None or not state.error.details["down_since_s"]["b"]:
            return False
        assert state.error.message.startswith("node b is down since "), state.error
        return True

    async def is_not_offered_b(self) -> bool:
        """Return whether the leader, on a, would place nothing on b."""
        question = PlaceCommand(model=DEMO_MODEL, nodes=["b"], context_tokens=256)
        try:
            await RpcClient(self.here.here.nats)("placement", "a", "preview", question, dict[str, object])
        except NotFound as e:
            assert "no inference service is live on b" in e.message
            return True
        return False

    async def has_liveness_key(self, node: str) -> bool:
        """Return whether the liveness key of its inference exists."""
        return await self.here.buckets.live.get(liveness_key(node, "inference")) is not None

    def send(self, node: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a node, its stages included."""
        for service in self.site[node].services.values():
            if not service.running:
                continue
            children = psutil.Process(service.pid).children(recursive=True)
            service.send(number)
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(number)


@asynccontextmanager
async def at_work(tmp_path: Path, server: NatsServer) -> AsyncIterator[Deaths]:
    """Place an instance over a and b, and wait until it is ready."""
    hub_root = tmp_path / "hub"
    shutil.copytree(MODELS_DIR / DEMO_MODEL, hub_root / DEMO_MODEL)
    with running_hub(hub_root, process=True) as hub:
        nodes = {n: Node(tmp_path / n, n, server.url, SERVICES, HF_ENDPOINT=hub.base_url) for n in "ab"}
        site = Site(server, hub, hub_root, nodes, repo=DEMO_MODEL)
        with running_nodes(*nodes.values()):
            async with site.join() as here:
                for node in nodes.values():
                    await node.ready(here.here)
                deaths = Deaths(site, here)
                try:
                    for name in nodes:
                        await here.pull_ok(name)
                    placed = await deaths.place("a", "b")
                    assert placed.ok, placed.error
                    deaths.instance = str(placed.result["instance"])
                    await deaths.wait_phase("ready")
                    await deaths.listen()
                    yield deaths
                except BaseException:
                    print(*(node.log() for node in nodes.values()))
                    raise


@pytest.mark.deadline_s(250.0)
async def test_a_broken_connection_reveals_a_death_before_key_expiry(tmp_path: Path, own_nats: NatsServer) -> None:
    async with at_work(tmp_path, own_nats) as deaths:
        # b does not lead: this test is about how its death is seen, not about how the next leader is elected.
        await asyncio.to_thread(deaths.site["b"]["placement"].stop)
        deaths.send("b", signal.SIGKILL)
        await deaths.wait_phase("degraded")
        await eventually(deaths.is_named_with_a_time, "the instance's error names b and since when", DEADLINE_S)
        await eventually(deaths.is_not_offered_b, "b is not offered for placement", DEADLINE_S)
        assert await deaths.has_liveness_key("b"), "only the missing key told of it"
        assert "event retired" not in deaths.observed


@pytest.mark.deadline_s(250.0)
async def test_a_node_with_a_missing_key_is_down_until_it_is_back(tmp_path: Path, own_nats: NatsServer) -> None:
    async with at_work(tmp_path, own_nats) as deaths:
        await asyncio.to_thread(deaths.site["b"]["placement"].stop)
        deaths.send("b", signal.SIGSTOP)
        try:
            await deaths.wait_phase("degraded")
            refused = await deaths.place("b")
            assert refused.error is not None and "no inference service is live on b" in refused.error.message
        finally:
            deaths.send("b", signal.SIGCONT)
        await deaths.wait_phase("ready")
        assert "event retired" not in deaths.observed


@pytest.mark.deadline_s(250.0)
@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_nats_outage_of_ten_seconds_declares_nobody_down(
    tmp_path: Path, own_nats: NatsServer, how: str
) -> None:
    async with at_work(tmp_path, own_nats) as deaths:
        if how == "killed":
            seen = deaths.here.here.nats.reconnects.count
            await asyncio.to_thread(own_nats.kill)
            await asyncio.sleep(OUTAGE_S)  # how long it is down
            await asyncio.to_thread(own_nats.start)
            await deaths.here.here.nats.reconnects.wait_after(seen)
        else:
            psutil.Process(own_nats.pid).suspend()
            await asyncio.sleep(OUTAGE_S)  # the same
            psutil.Process(own_nats.pid).resume()
        # Placed afterwards, on both: the leader has by now seen both and decided.
        placed = await deaths.place("a", "b")
        assert placed.ok, placed.error
        second = str(placed.result["instance"])

        async def ready() -> bool:
            state = await deaths.here.buckets.state.get_as(instance_key(second), InstanceState)
            return state is not None and state.phase == "ready"

        await eventually(ready, "another instance is ready", DEADLINE_S)
        await deaths.wait_phase("ready")
        assert not {"degraded", "failed", "node a", "node b", "event retired"} & set(deaths.observed), deaths.observed
