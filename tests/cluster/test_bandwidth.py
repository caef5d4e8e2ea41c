"""The passes of a working stage show how fast its node reads, and layouts are chosen by that."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from shoal_common.bus.keys import liveness_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.messages.liveness import LivenessRecord, NodeFacts
from shoal_demo.hub_server import running_hub
from shoal_inference.host_facts import device
from shoal_inference.host_facts.bandwidth_estimate import MIN_SAMPLE_BYTES
from shoal_inference.host_facts.device import machine_fingerprint
from shoal_inference.stage.compute.device import Device
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually
from tests.inference.tiny_models import write_model

MODEL = "org/wide"
IDLE = 1e8
"""Set as the idle bandwidth: slower than any machine is."""


async def facts_of(on: ShoalNode, node: str) -> NodeFacts:
    """Return the published facts of a node's inference."""
    async with on.operator() as here:
        live = await Buckets(here.js).live.get_as(liveness_key(node, "inference"), LivenessRecord)
        return live.facts if live is not None else NodeFacts()


def test_a_node_publishes_its_stages_bandwidth_across_a_restart(tmp_path: Path) -> None:
    home, models = tmp_path / "a", tmp_path / "models"
    directory = write_model(models / MODEL, "llama", width=640)
    assert (directory / "model.safetensors").stat().st_size > MIN_SAMPLE_BYTES
    home.mkdir()
    device.save_device(home, machine_fingerprint(), Device(accelerator="cpu", bytes_per_s=IDLE))
    with (
        running_hub(models, process=True) as hub,
        ShoalCluster(tmp_path, hub.base_url, names=("a",), SHOAL_MEMORY_BYTES_PER_S="") as cluster,
    ):
        node = cluster["a"]
        node.shoal("pull", MODEL, check=True)
        node.shoal("place", MODEL, check=True)
        preview = f"/v1/placements/preview?model={MODEL}"

        def by_the_idle_speed() -> float | None:
            tokens_per_s = float(node.call("GET", preview)["previews"][0]["tokens_per_s"])
            return tokens_per_s if tokens_per_s < IDLE / MIN_SAMPLE_BYTES else None

        # Until a node has published how fast it reads, the default is used.
        before = eventually(by_the_idle_speed, "the idle machine's speed is used")
        assert asyncio.run(facts_of(node, "a")).observed_bandwidth_bytes_per_s == 0

        def shown() -> float:
            ask = {"model": MODEL, "messages": [{"role": "user", "content": "go on"}], "max_tokens": 20}
            node.call("POST", "/v1/chat/completions", ask)
            return asyncio.run(facts_of(node, "a")).observed_bandwidth_bytes_per_s

        faster = eventually(shown, "what the stage has shown is said", 90.0)
        assert faster > 1.1 * IDLE
        eventually(
            lambda: node.call("GET", preview)["previews"][0]["tokens_per_s"] > before, "what was shown is used"
        )

        node.wait_reborn("inference", node.kill("inference"))
        kept = json.loads((home / "device.json").read_text())["observed_bytes_per_s"]
        assert kept > 1.1 * IDLE

        def published_again() -> bool:
            return asyncio.run(facts_of(node, "a")).observed_bandwidth_bytes_per_s >= float(kept)

        eventually(published_again, "what was shown before is said by the next start")
