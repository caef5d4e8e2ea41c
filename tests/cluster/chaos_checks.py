"""Invariants of a cluster that has settled, whatever happened to it, checked from outside."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping

from shoal_common.bus.keys import storage_key
from shoal_common.messages import decode
from shoal_common.messages.storage import ModelState, StorageState
from tests.fetcher.pull_site import Pulls, Site, blobs, manifests, partials, stray_blobs
from tests.harness.node import Node
from tests.harness.waiting import eventually

SETTLED_DEADLINE_S = 120.0
"""For the cluster to settle after the last fault."""


async def check(
    site: Site, here: Pulls, quotas: Mapping[str, int | None], removed: Collection[str], consumer_count: int
) -> None:
    """Check the invariants. `quotas`: the last ones that were set; `removed`: blobs that were removed by hand."""
    for node in site.nodes.values():
        await eventually(
            _matches_published_state(here, node), f"{node.id}'s disk is as it is said", SETTLED_DEADLINE_S
        )
        await asyncio.to_thread(_check_store, node, removed)
        published = await disk_of(here, node.id)
        quota = quotas.get(node.id, published.quota_bytes)
        assert published.quota_bytes == quota, f"a setting of {node.id} is lost"
        if quota is not None:
            assert published.used_bytes + published.reserved_bytes <= quota, "I3"
        assert not stray_blobs(node), f"I8: blobs of {node.id} that nothing needs"

    async def no_command_waits() -> bool:
        return (await here.here.js.stream_info("CMD")).state.messages == 0

    async def as_many_consumers() -> bool:
        return (await here.here.js.stream_info("CMD")).state.consumer_count == consumer_count

    await eventually(no_command_waits, "no command waits", SETTLED_DEADLINE_S)
    await eventually(as_many_consumers, "I8: consumers are back to what they were", SETTLED_DEADLINE_S)
    assert await _ghosts(site, here) == [], "I8"


async def still_works(site: Site, here: Pulls, model: str, size_bytes: int) -> None:
    """Check that each node carries out commands at once, and I9: the hub sends a model once for all nodes."""
    site.hub.reset_stats()
    for name in site.nodes:
        done = await here.ask(name, "configure", b'{"max_storage_bytes": null}', service="storage")
        assert done.ok, f"{name} is not configured: {done.error}"
        await here.pull_ok(name, model)
    assert site.hub_bytes(model) <= 1.02 * size_bytes, "I9"
    for node in site.nodes.values():
        await eventually(
            _matches_published_state(here, node), f"{node.id}'s disk is as it is said", SETTLED_DEADLINE_S
        )
        await here.delete(node.id, model)
        assert not [m for m in manifests(node) if m.repo == model]


def _check_store(node: Node, removed: Collection[str]) -> None:
    """Check I1, a blob hashes to its name, and I2, only blobs that were removed by hand are missing."""
    here = blobs(node)
    for sha256, path in here.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"I1: {path}"
    for manifest in manifests(node):
        missing = {f.sha256 for f in manifest.files} - here.keys()
        assert missing <= set(removed), f"I2: {manifest.model} on {node.id}: {missing}"


async def disk_of(here: Pulls, node: str) -> StorageState:
    """Return the published state of a node's disk."""
    state = await here.buckets.state.get_as(storage_key(node), StorageState)
    assert state is not None
    return state


def _matches_published_state(here: Pulls, node: Node) -> Callable[[], Awaitable[bool]]:
    async def matches() -> bool:
        info = await here.here.js.stream_info("KV_state", subjects_filter=f"$KV.state.model.{node.id}.>")
        published = set()
        for subject in info.state.subjects or {}:
            entry = await here.buckets.state.get(subject.removeprefix("$KV.state."))
            if entry is not None:
                published.add(decode(entry.value, ModelState).model)
        whole = await asyncio.to_thread(
            lambda: {m.model for m in manifests(node) if all(_has_blob(node, f.sha256) for f in m.files)}
        )
        disk = await here.buckets.state.get_as(storage_key(node.id), StorageState)
        if disk is None or published != whole or disk.reserved_bytes:
            return False
        return not await asyncio.to_thread(partials, node)

    return matches


def _has_blob(node: Node, sha256: str) -> bool:
    return node.layout.blob(sha256).exists()


async def _ghosts(site: Site, here: Pulls) -> list[str]:
    """Return the keys that name nodes which never existed."""
    known, found = set(site.nodes), []
    for bucket in ("state", "spec"):
        info = await here.here.js.stream_info(f"KV_{bucket}", subjects_filter=">")
        for subject in info.state.subjects or {}:
            kind, _, rest = subject.removeprefix(f"$KV.{bucket}.").partition(".")
            if (
                kind in ("storage", "model", "download", "shard", "links", "node")
                and rest.partition(".")[0] not in known
            ):
                found.append(subject)
    return found
