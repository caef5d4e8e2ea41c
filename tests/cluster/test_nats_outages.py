"""NATS killed repeatedly, NATS with an empty store, everything switched off: what continues, what is lost."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from nats.errors import Error as NatsError

from shoal_common.bus.keys import download_key, instance_key, liveness_key, stage_key, storage_key
from shoal_common.bus.streams import stream_configs
from shoal_common.messages.downloads import DownloadRequest
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.instances import InstanceState, StageState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.storage import StorageState
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo import DEMO_MODEL, MODELS_DIR
from shoal_demo.faults import Faults
from shoal_demo.hub_server import running_hub
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site, partials
from tests.harness.nats import NatsServer
from tests.harness.node import Node, running_nodes
from tests.harness.waiting import eventually

SERVICES = ("storage", "fetcher", "fileserver", "placement", "inference")
KILLS = 20
DEADLINE_S = 120.0
QUOTA_BYTES = 3 << 30
SLOWLY = Faults(bytes_per_s=LEAF_BYTES / 2)
KEPT, BIG, PAUSED = "org/kept", "org/big", "org/paused"
_OF_THE_DISK = ("storage.", "model.", "shard.")


class Cluster:
    """Two running nodes, and what a test reads of them."""

    def __init__(self, site: Site, here: Pulls) -> None:
        self.site, self.here = site, here
        self.pids = {(n.id, s): n[s].pid for n in site.nodes.values() for s in SERVICES}

    async def ask(self, service: str, node: str, verb: str, **body: object) -> dict[str, Any]:
        """Send a command that must succeed, and return its result."""
        outcome = await self.here.ask(node, verb, json.dumps(body).encode(), service=service)
        assert outcome.ok, outcome.error
        return outcome.result

    async def place(self) -> str:
        """Place the demo's model over both nodes, and wait until it is ready."""
        asked = await self.ask("placement", "any", "place", model=DEMO_MODEL, min_nodes=2, context_tokens=256)
        name = str(asked["instance"])
        await self.wait_phase(name, "ready")
        return name

    async def wait_phase(self, instance: str, phase: str) -> None:
        """Return once an instance is in this phase."""

        async def reached() -> bool:
            state = await self.here.buckets.state.get_as(instance_key(instance), InstanceState)
            return state is not None and state.phase == phase

        await eventually(reached, f"{instance} is {phase}", DEADLINE_S)

    async def wait_running_again(self, instance: str) -> None:
        """Return once an instance is ready in processes of the inference services that run now."""

        async def reached() -> bool:
            state = await self.here.buckets.state.get_as(instance_key(instance), InstanceState)
            stages = [await self.here.buckets.state.get_as(stage_key(instance, r), StageState) for r in range(2)]
            children = [psutil.Process(n["inference"].pid).children() for n in self.site.nodes.values()]
            well = all(stage is not None and stage.phase == "ready" for stage in stages)
            return state is not None and state.phase == "ready" and well and all(children)

        await eventually(reached, f"{instance} is ready again", DEADLINE_S)

    async def stages(self, instance: str) -> list[str]:
        """Return the processes that run an instance's stages."""
        found = [await self.here.buckets.state.get_as(stage_key(instance, r), StageState) for r in range(2)]
        return [stage.uid for stage in found if stage is not None]

    async def published_disks(self) -> dict[str, Any]:
        """Return the published states of all disks, without figures that change by themselves."""
        found: dict[str, Any] = {}
        for prefix in _OF_THE_DISK:
            for key in await self.here.buckets.state.keys(f"{prefix}>"):
                entry = await self.here.buckets.state.get(key)
                if entry is not None:
                    value = json.loads(entry.value)
                    found[key] = {k: v for k, v in value.items() if k not in ("free_bytes", "leases")}
        return found

    async def live(self) -> dict[str, str]:
        """Return the process of each service in `live`."""
        found = {}
        for node in self.site.nodes:
            for service in SERVICES:
                live = await self.here.buckets.live.get_as(liveness_key(node, service), LivenessRecord)
                if live is not None:
                    found[liveness_key(node, service)] = live.holder.uid
        return found

    async def consumers(self) -> set[str]:
        """Return the consumers of commands."""
        return {str(c.name) for c in await self.here.here.js.consumers_info("CMD")}

    def check_processes(self) -> None:
        """Check that no process has crashed or was restarted."""
        for (node, service), pid in self.pids.items():
            process = self.site[node][service]
            assert process.running and process.pid == pid
            log = process.log()
            assert "Traceback" not in log and "level=error" not in log, log

    async def same(self, poll: Any, before: object, what: str) -> None:
        """Return once the value is the same as before."""

        async def as_before() -> bool:
            try:
                return bool(await poll() == before)
            except NatsError:
                return False

        try:
            await eventually(as_before, what, DEADLINE_S)
        except AssertionError:
            raise AssertionError(f"{what}: {await poll()} instead of {before}") from None


@asynccontextmanager
async def cluster_of(tmp_path: Path, server: NatsServer) -> AsyncIterator[Cluster]:
    """Two nodes with models, a setting, and free space."""
    hub_root = tmp_path / "hub"
    shutil.copytree(MODELS_DIR / DEMO_MODEL, hub_root / DEMO_MODEL)
    with running_hub(hub_root, process=True) as hub:
        nodes = {n: Node(tmp_path / n, n, server.url, SERVICES, HF_ENDPOINT=hub.base_url) for n in "ab"}
        site = Site(server, hub, hub_root, nodes, repo=BIG)
        site.make({"model.bin": noise(2 * LEAF_BYTES + 7, KEPT), "config.json": b"{}"}, KEPT)
        site.make({"model.bin": noise(16 * LEAF_BYTES, BIG)})
        site.make({"model.bin": noise(6 * LEAF_BYTES, PAUSED)}, PAUSED)
        with running_nodes(*nodes.values()):
            async with site.join() as here:
                for node in nodes.values():
                    await node.ready(here.here)
                cluster = Cluster(site, here)
                try:
                    await cluster.ask("storage", "a", "configure", max_storage_bytes=QUOTA_BYTES)
                    for name in nodes:
                        await here.pull_ok(name, KEPT)
                        await here.pull_ok(name, DEMO_MODEL)
                    yield cluster
                except BaseException:
                    print(*(node.log() for node in nodes.values()))
                    raise


async def begin(cluster: Cluster, node: str, model: str) -> None:
    """Start a slow download that nobody waits for."""
    cluster.site.hub.set_faults(SLOWLY)
    data = json.dumps({"model": model, "id": f"pull-{model.rpartition('/')[2]}"}).encode()
    await cluster.here.here.client.publish(f"shoal.v1.cmd.fetcher.{node}.download", data)
    await cluster.here.durable(node, LEAF_BYTES, model)


async def outcome_of(cluster: Cluster, model: str) -> Outcome:
    """Return the outcome of that download."""
    identity = f"pull-{model.rpartition('/')[2]}"
    return await eventually(
        lambda: cluster.here.buckets.done.get_as(identity, Outcome), f"the pull of {model} ends", DEADLINE_S
    )


@pytest.mark.deadline_s(400.0)
async def test_I6_nats_killed_twenty_times_costs_nothing_but_the_wait(tmp_path: Path, own_nats: NatsServer) -> None:
    async with cluster_of(tmp_path, own_nats) as cluster:
        here, site = cluster.here, cluster.site
        instance = await cluster.place()
        stages = await cluster.stages(instance)
        published, live, consumers = await cluster.published_disks(), await cluster.live(), await cluster.consumers()
        kept_gets = site.gets("model.bin", KEPT)
        await begin(cluster, "b", BIG)
        for number in range(KILLS):
            seen = here.here.nats.reconnects.count
            await asyncio.to_thread(own_nats.restart)
            if number % 2:  # else it is killed before any service has reconnected
                await here.here.nats.reconnects.wait_after(seen)
        site.hub.reset_faults()
        assert (await outcome_of(cluster, BIG)).ok
        await here.assert_complete("b", {"model.bin": noise(16 * LEAF_BYTES, BIG)})
        await cluster.ask("storage", "b", "delete", model=BIG)
        await cluster.same(cluster.published_disks, published, "what is said of the disks")
        await cluster.same(cluster.live, live, "the same processes are live")
        await cluster.same(cluster.consumers, consumers, "the same services take commands")
        await cluster.wait_phase(instance, "ready")
        assert await cluster.stages(instance) == stages, "a stage was started again although only NATS was"
        assert site.gets("model.bin", KEPT) == kept_gets
        assert site.hub_bytes() <= (16 + 2 * KILLS) * LEAF_BYTES, "more than what was in flight was read again"
        cluster.check_processes()


@pytest.mark.deadline_s(400.0)
async def test_a_purged_bucket_is_published_again_within_a_minute(tmp_path: Path, own_nats: NatsServer) -> None:
    async with cluster_of(tmp_path, own_nats) as cluster:
        here = cluster.here
        instance = await cluster.place()
        await begin(cluster, "a", PAUSED)
        assert (await cluster.ask("fetcher", "a", "pause", model=PAUSED))["models"] == {PAUSED: "paused"}

        async def keys() -> set[str]:
            found = set(await here.buckets.state.keys(">"))
            # Links are measured again when they are needed, and a download that has ended is history.
            ended = {k for k in found if k.startswith("download.") and not k.endswith(PAUSED)}
            return {k for k in found - ended if not k.startswith("links.")}

        published = await keys()
        kinds = {key.partition(".")[0] for key in published}
        assert kinds >= {"storage", "model", "download", "stage", "instance", "members"}
        purged_s = asyncio.get_running_loop().time()
        await here.here.js.purge_stream("KV_state")
        await cluster.same(keys, published, "the keys of the state")
        assert asyncio.get_running_loop().time() - purged_s < 60
        await cluster.wait_phase(instance, "ready")


async def test_a_nats_without_its_store_loses_instances_and_no_files(tmp_path: Path, own_nats: NatsServer) -> None:
    async with cluster_of(tmp_path, own_nats) as cluster:
        here, site = cluster.here, cluster.site
        instance = await cluster.place()
        await begin(cluster, "a", PAUSED)
        assert (await cluster.ask("fetcher", "a", "pause", model=PAUSED))["models"] == {PAUSED: "paused"}
        assert (await outcome_of(cluster, PAUSED)).error is not None
        held = partials(site["a"])
        live, consumers = await cluster.live(), await cluster.consumers()
        await begin(cluster, "b", BIG)
        published = {k: v for k, v in (await cluster.published_disks()).items() if not k.startswith("storage.")}
        before = site.hub.stats().files

        await asyncio.to_thread(own_nats.wipe)

        async def models_and_shards() -> dict[str, Any]:
            return {k: v for k, v in (await cluster.published_disks()).items() if not k.startswith("storage.")}

        await cluster.same(models_and_shards, published, "what is said of models")
        await cluster.same(cluster.live, live, "the same processes are live")
        await cluster.same(cluster.consumers, consumers, "the same services take commands")
        streams = {str(s.config.name) for s in await here.here.js.streams_info()}
        assert streams == {str(s.name) for s in stream_configs(1)}
        for node, quota in (("a", QUOTA_BYTES), ("b", None)):
            disk = await here.buckets.state.get_as(storage_key(node), StorageState)
            assert disk is not None and disk.quota_bytes == quota

        # A node's fetcher publishes its download requests again: they continue or stay paused, also after a restart.
        async def wanted() -> bool:
            requests = [
                await here.buckets.spec.get_as(download_key(n, m), DownloadRequest)
                for n, m in (("a", PAUSED), ("b", BIG))
            ]
            return [w.paused for w in requests if w is not None] == [True, False]

        await eventually(wanted, "both requests are there again", DEADLINE_S)
        assert (await here.state("a", lambda s: s.phase == "paused", PAUSED)).error is None
        assert partials(site["a"]) == held
        await here.durable("b", LEAF_BYTES, BIG)
        site.hub.reset_faults()
        assert (await outcome_of(cluster, BIG)).ok
        await here.assert_complete("b", {"model.bin": noise(16 * LEAF_BYTES, BIG)})
        assert (await cluster.ask("fetcher", "a", "resume", model=PAUSED))["models"] == {PAUSED: "resumed"}
        ready = await here.state("a", lambda s: s.phase == "ready", PAUSED, DEADLINE_S)
        assert ready.resumed_bytes >= LEAF_BYTES
        for model, leaves in ((PAUSED, 6), (BIG, 16)):
            assert site.hub_bytes(model) <= (leaves + 2) * LEAF_BYTES, "more than what was in flight was read again"

        # An instance is recorded only in NATS: it is gone, and can be placed again from what is on the disks.
        async def gone() -> bool:
            inference = [psutil.Process(site[node]["inference"].pid) for node in site.nodes]
            running = any(process.children() for process in inference)
            return not running and await here.buckets.state.get(instance_key(instance)) is None

        await eventually(gone, "no process runs the instance any more", DEADLINE_S)
        await cluster.place()
        after = site.hub.stats().files
        assert {n: f.gets for n, f in after.items() if KEPT in n or DEMO_MODEL in n} == {
            n: f.gets for n, f in before.items() if KEPT in n or DEMO_MODEL in n
        }, "what was on a disk was fetched again"
        cluster.check_processes()


@pytest.mark.deadline_s(200.0)
async def test_bytes_of_a_request_lost_with_nats_are_kept_for_the_next(tmp_path: Path, own_nats: NatsServer) -> None:
    async with cluster_of(tmp_path, own_nats) as cluster:
        here, site = cluster.here, cluster.site
        await begin(cluster, "a", BIG)
        await asyncio.to_thread(site["a"]["fetcher"].kill)  # it knows of the download request
        held = partials(site["a"])
        assert held
        await asyncio.to_thread(own_nats.wipe)
        site["a"]["fetcher"].start()
        await site["a"].ready(here.here)
        assert await here.buckets.spec.get(download_key("a", BIG)) is None

        async def reserved() -> StorageState | None:
            disk = await here.buckets.state.get_as(storage_key("a"), StorageState)
            return disk if disk is not None and disk.reserved_bytes else None

        await eventually(reserved, "its room is still promised", DEADLINE_S)
        assert partials(site["a"]) == held
        site.hub.reset_faults()
        ready = await here.pull_ok("a", BIG)
        assert ready.resumed_bytes >= LEAF_BYTES
        assert site.hub_bytes(BIG) <= (16 + 2) * LEAF_BYTES


@pytest.mark.deadline_s(400.0)
async def test_I6_after_a_full_power_cycle_all_work_resumes_by_itself(tmp_path: Path, own_nats: NatsServer) -> None:
    async with cluster_of(tmp_path, own_nats) as cluster:
        here, site = cluster.here, cluster.site
        await cluster.ask("storage", "b", "pin", model=KEPT)
        instance = await cluster.place()
        await begin(cluster, "a", PAUSED)
        assert (await cluster.ask("fetcher", "a", "pause", model=PAUSED))["models"] == {PAUSED: "paused"}
        await begin(cluster, "b", BIG)
        before = site.hub.stats().files

        nodes = list(site.nodes.values())
        await asyncio.to_thread(own_nats.kill)
        for node in nodes:
            await asyncio.to_thread(node.kill)
        await asyncio.to_thread(own_nats.start)
        for node in nodes:
            node.start()
        for node in nodes:
            await node.ready(here.here)

        # Nothing is published.
        site.hub.reset_faults()
        ready = await here.state("b", lambda s: s.phase == "ready", BIG, DEADLINE_S)
        assert ready.resumed_bytes >= LEAF_BYTES
        await here.assert_complete("b", {"model.bin": noise(16 * LEAF_BYTES, BIG)})
        assert (await outcome_of(cluster, BIG)).ok
        assert site.hub_bytes(BIG) <= (16 + 2) * LEAF_BYTES, "more than what was in flight was read again"
        await cluster.wait_running_again(instance)
        assert (await here.state_now("a", PAUSED) or ready).phase == "paused"
        for name, quota, pinned in (("a", QUOTA_BYTES, 0), ("b", None, 1)):
            disk = await here.buckets.state.get_as(storage_key(name), StorageState)
            assert disk is not None and (disk.quota_bytes, len(disk.pinned)) == (quota, pinned)
        after = site.hub.stats().files
        for path in (n for n in after if KEPT in n or DEMO_MODEL in n):
            assert after[path].gets == before[path].gets, f"{path} was on a disk and was fetched again"
