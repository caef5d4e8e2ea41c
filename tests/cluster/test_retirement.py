"""Nodes that are gone for good, and what they may have left: a known failure of other systems, step by step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nats.js import JetStreamContext

from shoal_common.bus.keys import download_key, model_key, storage_key
from shoal_common.bus.kv_bucket import Bucket
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.storage import ModelState, StorageState
from shoal_common.store.store_paths import StorePaths
from shoal_demo.hub_server import RunningHub
from tests.harness import waiting
from tests.harness.shoal import ShoalCluster, ShoalNode, eventually

SILENCE_S = 60.0
COLLECTED_DEADLINE_S = 90.0
RETIRED = {"gone-1": "missing", "gone-2": "leftovers", "gone-3": "not-empty"}
COMMIT = "d" * 40


def model_of(node: str) -> str:
    return f"stale/{RETIRED[node]}"


async def stale_entries(js: JetStreamContext) -> list[tuple[Bucket, str]]:
    """Write what nodes retired months ago have left: downloads in every phase, download requests, models, a disk."""
    spec, state = Bucket(js, "spec"), Bucket(js, "state")
    keys: list[tuple[Bucket, str]] = []
    for node in RETIRED:
        name = model_of(node)
        await spec.put(download_key(node, name), DownloadRequest(model=name, requested_at_s=1.0))
        for phase in ("queued", "fetching", "failed", "ready"):
            download = DownloadState(node=node, model=f"{name}-{phase}", phase=phase, commit=COMMIT)
            await state.put(download_key(node, download.model), download)
            keys.append((state, download_key(node, download.model)))
        held = ModelState(node=node, repo=name, commit=COMMIT, size_bytes=10**12, file_count=9, revisions=["main"])
        await state.put(model_key(node, held.model), held)
        await state.put(storage_key(node), StorageState(node=node, model_count=1))
        keys += [(spec, download_key(node, name)), (state, model_key(node, held.model)), (state, storage_key(node))]
    return keys


def scatter_directories(store: StorePaths) -> None:
    """Make what their models may have left on a live disk: nothing, leftovers, a directory with content."""
    leftovers = store.root / "manifests" / "stale--leftovers"
    leftovers.mkdir(parents=True)
    (leftovers / f"{COMMIT}.json.new").write_text("{")
    not_empty = store.root / "views" / "stale--not-empty" / COMMIT
    not_empty.mkdir(parents=True)
    (not_empty / "a-persons-notes.txt").write_text("keep me")


async def written(js: JetStreamContext) -> dict[str, int]:
    """Return the last sequence of each stream, except liveness and the leader's lease."""
    streams = ("CMD", "EVT", "KV_spec", "KV_state", "KV_done")
    return {s: (await js.stream_info(s)).state.last_seq for s in streams}


async def retirements(js: JetStreamContext) -> list[dict[str, Any]]:
    """Return the `retired` events in the log."""
    last = (await js.stream_info("EVT")).state.last_seq
    messages = [await js.get_msg("EVT", sequence) for sequence in range(1, last + 1)]
    return [json.loads(m.data or b"") for m in messages if (m.subject or "").endswith(".retired")]


async def collected(on: ShoalNode, remove: Callable[[str], None]) -> None:
    """Check the whole retirement on a cluster of one live node."""
    async with on.operator() as nats:
        js = nats.js
        keys = await stale_entries(js)
        for node in RETIRED:
            await asyncio.to_thread(remove, model_of(node))

        async def all_gone() -> bool:
            return not [key for bucket, key in keys if await bucket.get(key) is not None]

        async def all_events_published() -> bool:
            return len(await retirements(js)) >= len(RETIRED)

        await waiting.eventually(all_gone, "no key names a retired node", COLLECTED_DEADLINE_S)
        await waiting.eventually(all_events_published, "each is told of", COLLECTED_DEADLINE_S)
        before = await written(js)
        await asyncio.sleep(SILENCE_S)  # nothing may happen meanwhile
        assert await written(js) == before, "a cluster in which nothing happens writes nothing"
        assert sorted(e["retired"] for e in await retirements(js)) == sorted(RETIRED)


def test_I5_I7_I8_retired_nodes_are_collected_once_without_a_hub(tmp_path: Path, quiet_hub: RunningHub) -> None:
    with ShoalCluster(tmp_path, quiet_hub.base_url, names=("a",), SHOAL_RETIRE_AFTER="12s") as cluster:
        node = cluster["a"]
        store = StorePaths(node.home / "store")
        scatter_directories(store)
        services = ("storage", "fetcher", "placement", "gateway")
        pids = {service: node.child(service).pid for service in services}

        def remove(model: str) -> None:
            removed = node.shoal("rm", model, "--node", "a")
            assert removed.returncode == 3 and f"{model} is not on a" in removed.stderr

        def counted() -> bool:
            row = node.call("GET", "/v1/status")["nodes"][0]
            return bool(row["storage"] and row["storage"]["foreign_count"] >= 1)

        eventually(counted, "what lies about is counted")
        asyncio.run(collected(node, remove))
        asked = quiet_hub.stats().requests
        assert (asked.api, asked.head, asked.get) == (0, 0, 0)
        assert {service: node.child(service).pid for service in services} == pids, "nothing has crashed"
        notes = store.root / "views" / "stale--not-empty" / COMMIT / "a-persons-notes.txt"
        assert notes.read_text() == "keep me"
        assert [n["node"] for n in node.call("GET", "/v1/status")["nodes"]] == ["a"]
