"""A few rounds of chaos; `make chaos` runs any number, with all kinds of faults or some."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from shoal_common.store.bitmap import LEAF_BYTES
from tests.cluster.chaos import HARMS, Chaos
from tests.cluster.chaos_checks import check, still_works
from tests.cluster.chaos_site import running_world

ROUNDS = int(os.environ.get("SHOAL_CHAOS_ROUNDS", "5"))
MANY_ROUNDS = 40
SEED = os.environ.get("SHOAL_CHAOS_SEED", "day-173")  # draws most kinds in a few rounds
KINDS = set((os.environ.get("SHOAL_CHAOS_KINDS") or ",".join(HARMS)).split(","))
MAX_OUTAGE_S = float(os.environ.get("SHOAL_CHAOS_LONGEST_S", "3"))


@pytest.mark.deadline_s(900.0 + (30.0 + MAX_OUTAGE_S) * max(ROUNDS, MANY_ROUNDS))
@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(MANY_ROUNDS, marks=pytest.mark.long)])
async def test_I1_I2_I3_I5_I7_I8_chaos_leaves_a_healthy_cluster(tmp_path: Path, rounds: int) -> None:
    assert HARMS.keys() >= KINDS, f"kinds of harm are {', '.join(HARMS)}"
    with running_world(tmp_path, KINDS) as world:
        site = world.site
        models = [f"org/chaos-{number}" for number in range(4)]
        shared = random.Random("shared").randbytes(2 * LEAF_BYTES + 7)
        sizes = {
            model: site.make({"own.bin": random.Random(model).randbytes(5 * LEAF_BYTES), "shared.bin": shared}, model)
            for model in models
        }
        async with site.join() as here:
            await world.authority.publish(here.buckets)
            for node in site.nodes.values():
                await node.ready(here.here)
            consumers = (await here.here.js.stream_info("CMD")).state.consumer_count
            chaos = Chaos(world, here, models, SEED, KINDS, MAX_OUTAGE_S)
            try:
                for number in range(rounds):
                    await chaos.round(number)
                await chaos.settle()
                await check(site, here, chaos.quotas, chaos.removed, consumers)
                await still_works(site, here, models[0], sizes[models[0]])
            except BaseException:
                print(f"seed {SEED!r}, {rounds} rounds of {', '.join(sorted(KINDS))}:", *chaos.did, sep="\n  ")
                for node in site.nodes.values():
                    print(node.log())
                raise
