"""Chaos, a few rounds of it; `make chaos` runs as many as are asked for."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from shoal_common.layout import LEAF_BYTES
from shoal_demo.running import running_hub
from tests.cluster.chaos import SERVICES, Chaos
from tests.fetcher.pulling import Site
from tests.harness.nats import NatsServer
from tests.harness.node import Node, running_nodes

ROUNDS = int(os.environ.get("SHOAL_CHAOS_ROUNDS", "4"))
SEED = os.environ.get("SHOAL_CHAOS_SEED", "a quiet day")


@pytest.mark.deadline_s(900.0 + 30.0 * ROUNDS)
async def test_I1_I2_I3_I5_I7_I8_whatever_happens_a_cluster_comes_to_rest_as_it_should(
    tmp_path: Path, own_nats: NatsServer
) -> None:
    hub_root = tmp_path / "hub"
    hub_root.mkdir()
    with running_hub(hub_root, process=True) as hub:
        names = "abc"
        nodes = {n: Node(tmp_path / n, n, own_nats.url, SERVICES, HF_ENDPOINT=hub.base_url) for n in names}
        site = Site(own_nats, hub, hub_root, nodes, repo="org/chaos")
        models = [f"org/chaos-{number}" for number in range(4)]
        shared = random.Random("shared").randbytes(2 * LEAF_BYTES + 7)
        for model in models:
            site.make({"own.bin": random.Random(model).randbytes(5 * LEAF_BYTES), "shared.bin": shared}, model)
        with running_nodes(*nodes.values()):
            async with site.join() as here:
                for node in nodes.values():
                    await node.ready(here.here)
                consumers = (await here.here.js.stream_info("CMD")).state.consumer_count
                chaos = Chaos(site, here, models, SEED)
                try:
                    for number in range(ROUNDS):
                        await chaos.round(number)
                    await chaos.settle()
                    await chaos.check(consumers)
                except BaseException:
                    print(f"seed {SEED!r}, {ROUNDS} rounds:", *chaos.did, sep="\n  ")
                    for node in nodes.values():
                        print(node.log())
                    raise
