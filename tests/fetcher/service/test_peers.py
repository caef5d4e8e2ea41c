"""Peers that lie, hang or leave, and clusters of more than two nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from shoal_common import VERSION
from shoal_common.bus.keys import download_key, liveness_key
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.liveness import LivenessRecord, NodeFacts, ProcessIdentity
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import DropAtByte, Faults
from tests.fetcher.fault_servers import Asked, Server, reply, serving
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site, check_store
from tests.harness.node import Node, running_nodes

LIAR = "liar"


@asynccontextmanager
async def claiming(here: Pulls, server: Server, blobs: list[str], version: str = VERSION) -> AsyncIterator[None]:
    """A live node with this server, which publishes that it has these blobs of the test's model."""
    live, state = liveness_key(LIAR, "fileserver"), download_key(LIAR, here.site.repo)
    holder = ProcessIdentity(uid="liar", host="elsewhere", pid=1)
    await here.buckets.live.put(
        live, LivenessRecord(holder=holder, version=version, facts=NodeFacts(addresses=[server.address]))
    )
    claim = DownloadState(node=LIAR, model=here.site.repo, phase="fetching", blobs=blobs)
    await here.buckets.state.put(state, claim)
    try:
        yield
    finally:
        await here.buckets.live.delete(live)
        await here.buckets.state.delete(state)


async def blob_of(here: Pulls, path: str) -> str:
    """Return the sha256 of a file, from a, which has the model."""
    return next(f.sha256 for f in (await here.manifest("a")).files if f.path == path)


def corrupted(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


async def test_I1_a_peer_with_wrong_bytes_is_banned_and_the_hub_used(site: Site) -> None:
    size = site.make(files := {"model.safetensors": noise(2 * LEAF_BYTES, site.repo)})

    async def lie(asked: Asked, writer: asyncio.StreamWriter) -> None:
        content = corrupted(files["model.safetensors"])
        writer.write(reply(206, content, content_range=f"bytes 0-{size - 1}/{size}"))

    async with site.join() as here, serving(lie) as server:
        await here.pull_ok("a")
        blob = await blob_of(here, "model.safetensors")
        assert (await here.delete("a")).ok
        site.hub.reset_stats()
        async with claiming(here, server, [blob]):
            state = await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert len(server.asked) == 1 and server.asked[0].path == f"/v1/blobs/{blob}"
        assert state.sources == {LIAR: size, "hub": size} and site.hub_bytes() == size
        assert state.done_bytes == size


async def test_a_node_of_another_major_version_is_asked_for_nothing(site: Site) -> None:
    size = site.make(files := {"model.safetensors": noise(2 * LEAF_BYTES, site.repo)})

    async def serve(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(206, files["model.safetensors"], content_range=f"bytes 0-{size - 1}/{size}"))

    async with site.join() as here, serving(serve) as server:
        await here.pull_ok("a")
        blob = await blob_of(here, "model.safetensors")
        assert (await here.delete("a")).ok
        async with claiming(here, server, [blob], version="99.0.0"):
            state = await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert server.asked == [] and state.sources == {"hub": size}


async def test_I1_with_an_honest_peer_beside_the_liar_no_hub_is_used(site: Site) -> None:
    size = site.make(files := {"model.safetensors": noise(2 * LEAF_BYTES, site.repo)})

    async def lie(asked: Asked, writer: asyncio.StreamWriter) -> None:
        content = corrupted(files["model.safetensors"])
        writer.write(reply(206, content, content_range=f"bytes 0-{size - 1}/{size}"))

    async with site.join() as here, serving(lie) as server:
        await here.pull_ok("a")
        site.hub.reset_stats()
        async with claiming(here, server, [await blob_of(here, "model.safetensors")]):
            state = await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert state.sources["a"] >= size and site.hub_bytes() == 0
        assert state.sources.get(LIAR, 0) <= 2 * LEAF_BYTES, "two bad leaves, and it is not asked again"


@pytest.mark.parametrize(
    "answer",
    [
        reply(404),
        reply(500),
        reply(302, location="http://127.0.0.1:1/"),
        b"not even HTTP\r\n\r\n",
        reply(206, b"x" * 100, content_range="bytes 5-104/2097152"),
        reply(200, b"y" * (3 * LEAF_BYTES)),
    ],
    ids=["404", "500", "302", "noise", "other range", "too long"],
)
async def test_a_peer_that_cannot_give_what_it_claims_only_costs_time(site: Site, answer: bytes) -> None:
    site.make(files := {"model.safetensors": noise(2 * LEAF_BYTES, site.repo)})
    async with site.join() as here, serving(answer) as server:
        await here.pull_ok("a")
        site.hub.reset_stats()
        async with claiming(here, server, [await blob_of(here, "model.safetensors")]):
            # Both nodes are asked in turn; a has it, which ends it.
            await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert site.hub_bytes() == 0


async def test_a_claim_that_nobody_can_be_asked_about_is_no_source(site: Site) -> None:
    """An invalid address, and an invalid blob name (I10)."""
    size = site.make(files := {"model.safetensors": noise(LEAF_BYTES, site.repo), "c.json": site.repo.encode()})
    async with site.join() as here, serving(b"") as server:
        bad = Server(0, [], tls=False)
        bad.address = "nowhere:99999/../x"
        await here.pull_ok("a")
        manifest = await here.manifest("a")
        git = next(f"git-{f.git_sha1}" for f in manifest.files if f.git_sha1)
        assert (await here.delete("a")).ok
        site.hub.reset_stats()
        async with claiming(here, bad, [f.sha256 for f in manifest.files]):
            claim = DownloadState(
                node=LIAR, model=site.repo, phase="fetching", blobs=["../../up"], sha256_by_git_name={git: "../../up"}
            )
            await here.buckets.state.put(download_key(LIAR, site.repo), claim)
            await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert site.hub_bytes() == size and not server.asked


@pytest.fixture
def more_nodes(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Node]:
    """c and d, not started yet."""
    homes: Path = tmp_path_factory.mktemp("more")
    environment = {"HF_ENDPOINT": site.hub.base_url}
    return {n: Node(homes / n, n, site.server.url, tuple(site["a"].services), **environment) for n in ("c", "d")}


async def test_I9_four_nodes_at_the_same_time_cost_the_hub_one_model(site: Site, more_nodes: dict[str, Node]) -> None:
    files = {f"{i}.safetensors": noise((i + 1) * LEAF_BYTES // 2, f"{site.repo}{i}") for i in range(6)}
    files |= {f"{i}.json": noise(500 + i, site.repo) for i in range(6)}
    size = site.make(files)
    site.nodes.update(more_nodes)
    try:
        with running_nodes(*more_nodes.values()):
            async with site.join() as here:
                for node in more_nodes.values():
                    await node.ready(here.here)
                states = await asyncio.gather(*(here.pull_ok(n) for n in "abcd"))
                assert site.hub_bytes() <= 1.02 * size
                for name, state in zip("abcd", states, strict=True):
                    await here.assert_complete(name, files)
                    assert state.done_bytes == state.total_bytes == size
                    check_store(site[name])
                await here.no_lease_is_left()
                # The first three die; the next node still needs no byte from the hub.
                site.hub.reset_stats()
                assert (await here.delete("a")).ok
                for node in more_nodes.values():
                    node["fetcher"].kill()
                await here.pull_ok("a")
                await here.assert_complete("a", files)
                assert site.hub_bytes() == 0
    finally:
        for name in more_nodes:
            del site.nodes[name]


async def test_a_large_file_does_not_need_memory_of_its_size(site: Site) -> None:
    size = site.make(files := {"model.safetensors": noise(256 * LEAF_BYTES, "256 MiB")})
    async with site.join() as here:
        fetchers = {n: psutil.Process(site[n]["fetcher"].pid) for n in "ab"}
        before = {n: p.memory_info().rss for n, p in fetchers.items()}
        most = dict.fromkeys(fetchers, 0)
        for node, process in fetchers.items():
            pull = asyncio.create_task(here.pull_ok(node))
            while not pull.done():
                most[node] = max(most[node], process.memory_info().rss - before[node])
                await asyncio.wait({pull}, timeout=0.01)
            await pull
        assert site.hub_bytes() == size
        await here.assert_complete("b", files)
        for node in "ab":
            assert (await here.delete(node)).ok
        print({n: f"{b >> 20} MiB" for n, b in most.items()})
        assert max(most.values()) < 64 << 20, {n: f"{b >> 20} MiB" for n, b in most.items()}


async def test_I7_a_source_that_never_completes_a_leaf_ends_it(site: Site) -> None:
    site.make({"model.safetensors": noise(2 * LEAF_BYTES, site.repo)})
    directory = site["a"].home / "impatient"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import shoal_fetcher.downloads.state_machine as s\ns.NO_PROGRESS_TIMEOUT_S = 1.0\n"
    )
    usual = site["a"]["fetcher"].environment["PYTHONPATH"]
    # 300 KB of each answer get through: many bytes, and never a leaf.
    site.hub.set_faults(Faults(drop_at_byte=DropAtByte(after_bytes=300_000, times=None)))
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher", PYTHONPATH=f"{directory}:{usual}")
        code, message = await here.pull_fails("a")
        assert code == "unavailable"
        assert "no progress on model.safetensors for 1 s" in message and "broke off" in message
        state = await here.state_now("a")
        assert state is not None and state.done_bytes == 0 and state.sources["hub"] > 300_000 // 2
        await here.nothing_is_left("a")
        await site["a"].restart(here.here, "fetcher")
