"""A node that announces a model under the hub's own commit with other files (docs/transfer.md)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from msgspec import structs

from shoal_common import VERSION
from shoal_common.bus import subjects
from shoal_common.bus.keys import liveness_key, model_key
from shoal_common.messages import decode
from shoal_common.messages.liveness import LivenessRecord, NodeFacts, ProcessIdentity
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import GetManifest, ModelState
from shoal_common.names import model_id
from shoal_common.rpc.request_reply import RpcEndpoint, serve
from tests.fetcher.fault_servers import Asked, Server, reply, serving
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site

LIAR = "liar"
OTHER = noise(300_000, "other weights")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def replaced(manifest: Manifest, path: str, data: bytes) -> Manifest:
    """Return a manifest with another file of this path; the git sha1 stays the hub's."""
    files = [
        structs.replace(f, size_bytes=len(data), sha256=sha256(data), leaf_list_digest="") if f.path == path else f
        for f in manifest.files
    ]
    return structs.replace(manifest, files=files)


@asynccontextmanager
async def announcing(here: Pulls, server: Server, manifest: Manifest, revision: str = "main") -> AsyncIterator[None]:
    """A live node with this server, which publishes that it has this model, and returns this manifest of it."""
    holder = ProcessIdentity(uid="liar", host="elsewhere", pid=1)
    live = {service: liveness_key(LIAR, service) for service in ("fileserver", "storage")}
    state = ModelState(
        node=LIAR,
        repo=manifest.repo,
        commit=manifest.commit,
        size_bytes=manifest.size_bytes,
        file_count=len(manifest.files),
        revisions=[revision],
    )
    key = model_key(LIAR, manifest.model)

    async def answer(_: GetManifest) -> Manifest:
        return manifest

    stopping = asyncio.Event()
    answering = asyncio.create_task(
        serve(here.here.nats, "storage", LIAR, {"manifest": RpcEndpoint(GetManifest, answer)}, stopping)
    )
    facts = NodeFacts(addresses=[server.address])
    for record in live.values():
        await here.buckets.live.put(record, LivenessRecord(holder=holder, version=VERSION, facts=facts))
    await here.buckets.state.put(key, state)
    try:
        yield
    finally:
        await here.buckets.state.delete(key)
        for record in live.values():
            await here.buckets.live.delete(record)
        stopping.set()
        await answering


async def send_other(asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Answer as a fileserver that has the other weights, and nothing else."""
    blob = asked.path.removeprefix("/v1/blobs/")
    content = OTHER if blob == sha256(OTHER) else b""
    size = len(content)
    writer.write(reply(206, content, content_range=f"bytes 0-{size - 1}/{size}") if content else reply(404))


async def model_on(here: Pulls, node: str, manifest: Manifest) -> ModelState | None:
    return await here.buckets.state.get_as(model_key(node, manifest.model), ModelState)


async def refusals(here: Pulls, node: str) -> list[dict[str, object]]:
    """Return the events `manifest_refused` of a node's fetcher about this test's model."""
    subject, found, after = subjects.event("fetcher", node, "manifest_refused"), [], 0
    info = await here.here.js.stream_info("EVT", subjects_filter=subject)
    for _ in range(sum((info.state.subjects or {}).values())):
        message = await here.here.js.get_msg("EVT", seq=after + 1, subject=subject, next=True)
        after = message.seq or 0
        found.append(decode(message.data or b"", dict[str, object]))
    return [event for event in found if str(event["model"]).startswith(here.site.repo)]


async def genuine(here: Pulls) -> Manifest:
    """Return the hub's manifest, as a node has it that pulled the model and deleted it again."""
    await here.pull_ok("a")
    manifest = await here.manifest("a")
    assert (await here.delete("a")).ok
    return manifest


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
async def test_I1_other_files_under_the_hubs_commit_are_refused(site: Site, path: str) -> None:
    files = {"model.safetensors": noise(300_000, site.repo), "config.json": noise(400, site.repo)}
    site.make(files)
    async with site.join() as here, serving(send_other) as server:
        lie = replaced(await genuine(here), path, OTHER)
        async with announcing(here, server, lie):
            await here.pull_ok("b")
        await here.assert_complete("b", files)
        state = await model_on(here, "b", lie)
        assert state is not None and state.unchecked_from == ""
        [event] = await refusals(here, "b")
        assert event["peer"] == LIAR and path in str(event["reason"])


async def test_I1_a_small_file_with_another_sha256_comes_from_the_hub(site: Site) -> None:
    """Its size and git sha1 are the hub's: only its bytes can tell."""
    files = {"model.safetensors": noise(300_000, site.repo), "config.json": noise(400, site.repo)}
    site.make(files)
    wrong = noise(400, "wrong")

    async def send(asked: Asked, writer: asyncio.StreamWriter) -> None:
        found = {sha256(data): data for data in (*files.values(), wrong)}.get(asked.path.removeprefix("/v1/blobs/"))
        size = len(found or b"")
        writer.write(reply(206, found, content_range=f"bytes 0-{size - 1}/{size}") if found else reply(404))

    async with site.join() as here, serving(send) as server:
        lie = replaced(await genuine(here), "config.json", wrong)
        site.hub.reset_stats()
        async with announcing(here, server, lie):
            await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert any(asked.path.endswith(sha256(wrong)) for asked in server.asked)
        assert site.gets("config.json") == 1 and site.gets("model.safetensors") == 0


async def test_a_commit_that_the_hub_does_not_have_is_no_main(site: Site) -> None:
    files = {"model.safetensors": noise(300_000, site.repo)}
    site.make(files)
    async with site.join() as here, serving(send_other) as server:
        lie = structs.replace(replaced(await genuine(here), "model.safetensors", OTHER), commit="f" * 40)
        async with announcing(here, server, lie):
            await here.pull_ok("b")
        await here.assert_complete("b", files)
        [event] = await refusals(here, "b")
        assert "no such commit" in str(event["reason"])


async def test_a_model_that_the_hub_does_not_show_is_unchecked(site: Site) -> None:
    repo, commit = f"{site.repo}-private", "d" * 40
    file = ManifestFile(path="model.safetensors", size_bytes=len(OTHER), sha256=sha256(OTHER))
    manifest = Manifest(repo=repo, commit=commit, files=[file], revisions=["main"])
    async with site.join() as here, serving(send_other) as server:
        async with announcing(here, server, manifest):
            await here.pull_ok("b", repo)
        state = await model_on(here, "b", manifest)
        assert state is not None and state.unchecked_from == LIAR
        assert state.model == model_id(repo, commit)
        assert (await here.delete("b", repo)).ok


async def test_what_came_unchecked_is_replaced_once_the_hub_answers(site: Site) -> None:
    """With the hub out of reach a node's word is all there is: it is marked, and its blobs are what it says."""
    files = {"model.safetensors": noise(300_000, site.repo), "config.json": noise(400, site.repo)}
    site.make(files)
    async with site.join() as here, serving(send_other) as server:
        genuine_manifest = await genuine(here)
        weights = [
            f for f in replaced(genuine_manifest, "model.safetensors", OTHER).files if f.sha256 == sha256(OTHER)
        ]
        lie = structs.replace(genuine_manifest, files=weights)
        try:
            await site["b"].restart(here.here, "fetcher", HF_ENDPOINT="http://127.0.0.1:1")
            async with announcing(here, server, lie):
                await here.pull_ok("b")
            state = await model_on(here, "b", lie)
            assert state is not None and state.unchecked_from == LIAR
            assert sha256(site["b"].layout.view_file(lie, "model.safetensors").read_bytes()) == sha256(OTHER)
        finally:
            await site["b"].restart(here.here, "fetcher")
        await here.pull_ok("b")
        await here.assert_complete("b", files)
        state = await model_on(here, "b", lie)
        assert state is not None and state.unchecked_from == "" and state.file_count == 2
        [event] = await refusals(here, "b")
        assert event["peer"] == LIAR
