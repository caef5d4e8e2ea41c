"""Flipped bytes on a node's disk: not served, not published, and repaired by fetching only the corrupt leaves."""

from __future__ import annotations

import re

import httpx2

from shoal_common.bus.keys import liveness_key, model_key
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import ModelState
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import leaf_hash
from shoal_demo.faults import Faults, UnavailableFault
from shoal_storage.files import leaf_hash_file
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.storage.service.test_verifier import flip

BLOB_LEAVES = 6
TWO_BAD = (LEAF_BYTES + 5, 4 * LEAF_BYTES)
"""Offsets in two leaves that are not adjacent."""


def files_of(seed: str) -> dict[str, bytes]:
    """A model with a blob of several MiB whose last leaf is short."""
    return {"model.safetensors": noise((BLOB_LEAVES - 1) * LEAF_BYTES + 99, seed), "config.json": b"{}"}


async def rot(here: Pulls, node: str, *offsets: int) -> Manifest:
    """Flip bytes of the large blob on a node's disk, and have it verified. Returns the manifest, which stays."""
    manifest = await here.manifest(node)
    path = here.site[node].layout.blob(weights(manifest))
    for offset in offsets:
        flip(path, offset)
    outcome = await here.ask(node, "verify", b"{}", service="storage")
    assert outcome.ok, outcome.error
    assert outcome.result["corrupt"] == [weights(manifest)]
    assert outcome.result["bad_leaves"] == len({o // LEAF_BYTES for o in offsets})
    assert manifest.model in outcome.result["incomplete"]
    return manifest


def weights(manifest: Manifest) -> str:
    """Return the large blob."""
    return next(f.sha256 for f in manifest.files if f.path == "model.safetensors")


def asked_bytes(site: Site) -> int:
    """Return the bytes of the large file requested from the hub. A GET without a range requests all."""
    found = site.hub.stats().files.get(f"{site.repo}/model.safetensors")
    if found is None:
        return 0
    assert found.gets == len(found.ranges), "the whole file was asked for"
    ends = [re.fullmatch(r"bytes=(\d+)-(\d+)", asked) for asked in found.ranges]
    return sum(int(m.group(2)) + 1 - int(m.group(1)) for m in ends if m is not None)


async def served(here: Pulls, node: str, blob: str) -> int:
    """Return a fileserver's answer to a request for a blob."""
    live = await here.buckets.live.get_as(liveness_key(node, "fileserver"), LivenessRecord)
    assert live is not None
    async with httpx2.AsyncClient(trust_env=False) as client:
        return (await client.get(f"http://{live.facts.addresses[0]}/v1/blobs/{blob}")).status_code


async def test_I1_two_corrupt_leaves_are_not_served_and_cost_only_two(site: Site) -> None:
    site.make(files := files_of(site.repo))
    async with site.join() as here:
        await here.pull_ok("a")
        manifest = await rot(here, "a", *TWO_BAD)
        assert await served(here, "a", weights(manifest)) == 404
        assert await here.buckets.state.get_as(model_key("a", manifest.model), ModelState) is None
        site.hub.reset_stats()
        state = await here.pull_ok("a", manifest.model)
        await here.assert_complete("a", files)
        assert asked_bytes(site) == 2 * LEAF_BYTES
        assert site.hub_bytes() == 2 * LEAF_BYTES == sum(state.sources.values())
        assert site.hub.stats().requests.api == 0, "the manifest was here"
        assert await served(here, "a", weights(manifest)) == 200
        ready = await here.buckets.state.get_as(model_key("a", manifest.model), ModelState)
        assert ready is not None and "main" in ready.revisions
        assert leaf_hash_file.is_verified(site["a"].layout, weights(manifest))


async def test_the_short_last_leaf_comes_from_a_peer_without_the_hub(site: Site) -> None:
    site.make(files := files_of(site.repo))
    async with site.join() as here:
        await here.pull_ok("a")
        await here.pull_ok("b")
        manifest = await rot(here, "b", len(files["model.safetensors"]) - 1)
        site.hub.set_faults(Faults(unavailable=UnavailableFault(times=None)))
        state = await here.pull_ok("b", manifest.model)
        await here.assert_complete("b", files)
        assert state.sources == {"a": 99}


async def test_a_model_nobody_else_has_is_repaired_from_a_shared_blob(site: Site) -> None:
    site.make(files := files_of(site.repo))
    other = f"{site.repo}-other"
    site.make({"same.safetensors": files["model.safetensors"]}, other)
    async with site.join() as here:
        await here.pull_ok("a")
        await here.pull_ok("b", other)
        manifest = await rot(here, "a", *TWO_BAD)
        site.hub.set_faults(Faults(unavailable=UnavailableFault(times=None)))
        state = await here.pull_ok("a", manifest.model)
        await here.assert_complete("a", files)
        assert state.sources == {"b": 2 * LEAF_BYTES}


async def test_false_leaf_hashes_cost_one_blob_and_no_wrong_byte(site: Site) -> None:
    site.make(files := files_of(site.repo))
    async with site.join() as here:
        await here.pull_ok("a")
        manifest, layout = await here.manifest("a"), site["a"].layout
        blob = layout.blob(weights(manifest))
        flip(blob, LEAF_BYTES)
        # Computed from the flipped bytes: it calls the corrupt leaf intact, and another one corrupt.
        data = blob.read_bytes()
        lie = [leaf_hash(data[at : at + LEAF_BYTES]) for at in range(0, len(data), LEAF_BYTES)]
        lie[3] = leaf_hash(b"?")
        leaf_hash_file.write(layout, blob.name, b"".join(lie), blob.stat().st_mtime_ns)
        assert (await here.ask("a", "verify", b"{}", service="storage")).result["bad_leaves"] == 1
        site.hub.reset_stats()
        state = await here.pull_ok("a", manifest.model)
        await here.assert_complete("a", files)
        assert sum(state.sources.values()) == LEAF_BYTES + len(data)


async def test_I6_a_repair_that_is_killed_resumes_with_its_leaves(site: Site) -> None:
    site.make(files := files_of(site.repo))
    async with site.join() as here:
        await here.pull_ok("a")
        manifest = await rot(here, "a", *TWO_BAD)
        site.hub.set_faults(Faults(unavailable=UnavailableFault(times=None)))
        pulling = await here.begin("a", manifest.model)
        good_bytes = sum(len(content) for content in files.values()) - 2 * LEAF_BYTES
        await here.state("a", lambda s: s.done_bytes == good_bytes and s.phase == "fetching", manifest.model)
        for service in ("storage", "fetcher"):
            await site["a"].restart(here.here, service)
        site.hub.reset_faults()
        site.hub.reset_stats()
        await here.state("a", lambda s: s.phase == "ready", manifest.model, deadline_s=45.0)
        await here.assert_complete("a", files)
        assert asked_bytes(site) == 2 * LEAF_BYTES
        pulling.cancel()
