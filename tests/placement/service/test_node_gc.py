"""The leader retires nodes that are down: real processes, real NATS, nodes that are only keys."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nats.js import api
from nats.js.errors import NotFoundError

from shoal_common.bus import subjects
from shoal_common.bus.keys import (
    download_key,
    instance_key,
    links_key,
    model_key,
    node_key,
    shard_key,
    stage_key,
    storage_key,
)
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.instances import InstanceSpec, StageSpec, StageState
from shoal_common.messages.placement import Forget, LinksState, NodeState
from shoal_common.messages.storage import ShardState, StorageState
from shoal_common.names import model_id
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.placement.placement_cluster import COMMIT, FOLLOW_DEADLINE_S, MODEL, Cluster, cluster_of

SOON = {"SHOAL_RETIRE_AFTER": "1s"}
NEVER = {"SHOAL_RETIRE_AFTER": "999d"}


async def leave_traces(c: Cluster, node: str, live: str, model_count: int = 1) -> list[tuple[str, str]]:
    """Write every kind of key that names a node. Return the keys, by bucket."""
    state, spec = c.here.buckets.state, c.here.buckets.spec
    keys = []
    for number in range(model_count):
        name = f"org/m{number}"
        download = DownloadState(node=node, model=name, phase="fetching", commit=COMMIT)
        await state.put(download_key(node, name), download)
        await spec.put(download_key(node, name), DownloadRequest(model=name, requested_at_s=1.0))
        keys += [("state", download_key(node, name)), ("spec", download_key(node, name))]
    await c.hold(node)
    await state.put(storage_key(node), StorageState(node=node))
    part = ShardState(node=node, repo="org/p", commit=COMMIT, layers=[[0, 1]], size_bytes=1, total_bytes=2)
    await state.put(shard_key(node, model_id("org/p", COMMIT)), part)
    await state.put(links_key(node), LinksState(node=node))
    stages = [StageSpec(rank=r, node=n, first_layer=r, last_layer=r + 1) for r, n in enumerate((live, node))]
    instance = InstanceSpec(id=f"on-{node}", repo=MODEL, commit=COMMIT, stages=stages, context_tokens=64)
    await spec.put(instance_key(instance.id), instance)
    stage = StageState(instance=instance.id, rank=1, node=node, epoch=1, phase="ready")
    await state.put(stage_key(instance.id, 1), stage)
    waiting = subjects.command("storage", node, "gc")
    consumer = api.ConsumerConfig(
        durable_name=f"storage-{node}", filter_subject=subjects.all_commands("storage", node)
    )
    await c.here.js.add_consumer("CMD", consumer)
    await c.here.client.publish(waiting, b"{}")
    return [
        *keys,
        ("state", model_key(node, model_id(MODEL, COMMIT))),
        ("state", storage_key(node)),
        ("state", shard_key(node, model_id("org/p", COMMIT))),
        ("state", links_key(node)),
        ("state", stage_key(instance.id, 1)),
        ("spec", instance_key(instance.id)),
    ]


async def existing_keys(c: Cluster, keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those of the keys that exist."""
    found = [(b, k, await getattr(c.here.buckets, b).get(k)) for b, k in keys]
    return [(b, k) for b, k, entry in found if entry is not None]


async def wait_removed(c: Cluster, keys: list[tuple[str, str]]) -> None:
    async def none_is_there() -> bool:
        return not await existing_keys(c, keys)

    await eventually(none_is_there, "no key names the node any more", FOLLOW_DEADLINE_S)


@asynccontextmanager
async def retirements(c: Cluster) -> AsyncIterator[list[dict[str, Any]]]:
    """Collect the `retired` events while the body runs."""
    events: list[dict[str, Any]] = []

    async def hear(message: Any) -> None:
        events.append(json.loads(message.data))

    listening = await c.here.client.subscribe(f"{subjects.ROOT}.evt.placement.*.retired", cb=hear)
    await c.here.client.flush()
    yield events
    await listening.unsubscribe()


async def wait_events(c: Cluster, events: list[dict[str, Any]], count: int) -> None:
    async def so_many() -> bool:
        await c.here.client.flush()
        return len(events) >= count

    await eventually(so_many, f"{count} events", FOLLOW_DEADLINE_S)


async def wait_node_down(c: Cluster, node: str) -> NodeState:
    return await eventually(
        lambda: c.here.buckets.state.get_as(node_key(node), NodeState), f"{node} is silent", FOLLOW_DEADLINE_S
    )


async def test_I8_keys_of_a_retired_node_go_once_with_one_event(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, retirements(c) as events, c.placement("p-1", **SOON):
        await asyncio.gather(c.beat("a", 400), c.hold("a"))
        keys = await leave_traces(c, "ghost", "a") + await leave_traces(c, "spook", "a", model_count=40)
        await wait_removed(c, keys)
        await wait_events(c, events, 2)
        assert sorted(e["retired"] for e in events) == ["ghost", "spook"]
        assert {e["retired"]: e["instances"] for e in events} == {"ghost": ["on-ghost"], "spook": ["on-spook"]}
        assert await c.here.buckets.state.get(node_key("ghost")) is None
        assert await c.here.buckets.state.get(model_key("a", model_id(MODEL, COMMIT))) is not None, (
            "who lives keeps all"
        )
        assert (await c.here.js.stream_info("CMD", subjects_filter="shoal.v1.cmd.storage.*.gc")).state.messages == 0
        for node in ("ghost", "spook"):
            try:
                await c.here.js.consumer_info("CMD", f"storage-{node}")
            except NotFoundError:
                continue
            raise AssertionError(f"{node}'s consumer is there still")
        written = [await c.here.last_sequence(s) for s in ("KV_state", "KV_spec", "EVT", "CMD")]
        await c.beat("a", 400)
        assert (await c.ask("forget", Forget(node="ghost"))).result == {
            "node": "ghost",
            "found": False,
            "key_count": 0,
        }
        now = [await c.here.last_sequence(s) for s in ("KV_state", "KV_spec", "EVT")]
        assert now == written[:3] and len(events) == 2, "only the command itself was written"


async def test_a_node_that_comes_back_in_time_keeps_its_keys(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, retirements(c) as events, c.placement("p-1", **NEVER):
        await c.beat("a", 400)
        keys = await leave_traces(c, "night", "a")
        assert (await wait_node_down(c, "night")).down_since_s > 0
        await c.beat("night", 400)

        async def is_back() -> bool:
            return await c.here.buckets.state.get(node_key("night")) is None

        await eventually(is_back, "it is not silent any more", FOLLOW_DEADLINE_S)
        assert await existing_keys(c, keys) == keys and not events


async def test_forget_takes_a_down_node_at_once_and_refuses_a_live_one(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, retirements(c) as events, c.placement("p-1", **NEVER):
        await c.beat("a", 400)
        keys = await leave_traces(c, "given-away", "a")
        await c.hold("a")
        refused = await c.ask("forget", Forget(node="a"))
        assert refused.error is not None and refused.error.code == "in_use" and "shoal down" in refused.error.message
        garbled = await c.ask("forget", Forget(node="../a"))
        assert garbled.error is not None and garbled.error.code == "bad_name"
        done = await c.ask("forget", Forget(node="given-away"))
        assert done.ok and done.result["found"] and done.result["key_count"] == len(keys) - 1, "its instance besides"
        assert not await existing_keys(c, keys)
        await wait_events(c, events, 1)
        assert [(e["retired"], e["reason"]) for e in events] == [("given-away", "forgotten")]
        assert await c.here.buckets.state.get(model_key("a", model_id(MODEL, COMMIT))) is not None


async def test_I8_I6_a_leader_killed_in_the_middle_is_succeeded(own_nats: NatsServer, tmp_path: Path) -> None:
    async with cluster_of(own_nats, tmp_path) as c, retirements(c) as events:
        keys = await leave_traces(c, "ghost", "a", model_count=300)
        async with c.placement("p-1", **SOON) as first:

            async def begun() -> bool:
                return await c.here.buckets.spec.get(instance_key("on-ghost")) is None

            await eventually(begun, "it has begun", FOLLOW_DEADLINE_S)
            await first.kill()
        async with c.placement("p-2", **SOON):
            await wait_removed(c, keys)

            async def all_gone() -> bool:
                return await c.here.buckets.state.get(node_key("ghost")) is None

            await eventually(all_gone, "its NodeState goes last", FOLLOW_DEADLINE_S)
            await c.here.client.flush()
            assert [e["retired"] for e in events if e["retired"] != "a"] == ["ghost"], "a was never there either"
