"""An instance that was forced into too little memory is killed, and its node survives."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec import structs

from shoal_common.bus.keys import instance_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.messages.instances import InstanceSpec
from shoal_demo import DEMO_MODEL
from shoal_demo.hub_server import RunningHub
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually

MORE_THAN_ANY_MACHINE_HAS = str(1 << 60)


async def force(node: ShoalNode, instance: str) -> None:
    """Mark an instance as placed by force: the model is too small to need that on a machine that runs tests."""
    async with node.operator() as here:
        spec = Buckets(here.js).spec
        placed = await spec.get_as(instance_key(instance), InstanceSpec)
        assert placed is not None
        await spec.put(instance_key(instance), structs.replace(placed, tier="force", epoch=placed.epoch + 1))


def test_a_forced_instance_is_killed_before_the_machine_starves(tmp_path: Path, hub: RunningHub) -> None:
    with ShoalCluster(
        tmp_path, hub.base_url, names=("a",), SHOAL_FORCE_FLOOR_BYTES=MORE_THAN_ANY_MACHINE_HAS
    ) as cluster:
        node = cluster["a"]
        node.shoal("pull", DEMO_MODEL, check=True)
        node.shoal("place", DEMO_MODEL, check=True)
        (instance,) = node.call("GET", "/v1/instances")["instances"]
        assert instance["phase"] == "ready", "one that fits does not give way, however little is left"
        pid = node.child("inference").pid
        asyncio.run(force(node, instance["id"]))

        def stopped() -> dict[str, object] | None:
            (now,) = node.call("GET", "/v1/instances")["instances"]
            return now if now["phase"] == "failed" else None

        error = eventually(stopped, "the instance gives way")["error"]
        assert isinstance(error, dict) and error["code"] == "no_room" and "forced onto this node" in error["message"]
        assert node.child("inference").pid == pid
        node.shoal("stop", instance["id"], check=True)
        assert node.call("GET", "/v1/instances")["instances"] == []
        node.shoal("place", DEMO_MODEL, check=True)
