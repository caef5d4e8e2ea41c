"""Pulling on whole nodes: real NATS, storage, fetcher and fileserver, and a hub that counts what it sends."""

from __future__ import annotations

import asyncio
import json
import stat

import psutil

from shoal_common.bus.keys import done_key
from shoal_common.messages.envelope import Outcome
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults
from shoal_fetcher.downloads.blob_fetcher import MAX_CONCURRENT_BLOBS
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Site, blobs
from tests.harness.waiting import eventually

FULL = 1.02


def files_of(seed: str, big_bytes: int = 5 * LEAF_BYTES + 123) -> dict[str, bytes]:
    """A model with large and small files, in folders, one empty, two alike."""
    return {
        "model-00001-of-00002.safetensors": noise(big_bytes, seed + "1"),
        "model-00002-of-00002.safetensors": noise(2 * LEAF_BYTES, seed + "2"),
        "config.json": noise(700, seed + "3"),
        "tokenizer/vocab file+ü.txt": noise(50_000, seed + "4"),
        "tokenizer/copy of config.json": noise(700, seed + "3"),
        ".gitattributes": b"",
    }


async def test_one_node_pulls_each_byte_once_and_its_view_is_the_model(site: Site) -> None:
    size = site.make(files := files_of(site.repo))
    async with site.join() as here:
        state = await here.pull_ok("a")
        await here.assert_complete("a", files)
        distinct = size - 700
        assert (state.phase, state.done_bytes, state.total_bytes) == ("ready", distinct, distinct)
        assert state.sources == {"hub": distinct} and state.resumed_bytes == 0
        assert site.hub_bytes() == distinct
        assert state == await here.state_now("a")
        await here.no_lease_is_left()
        layout = site["a"].layout
        assert stat.S_IMODE(layout.root.stat().st_mode) == 0o700
        readable = [p for p in layout.root.rglob("*") if p.is_file() and p.stat().st_mode & 0o077]
        assert {p.parts[len(layout.root.parts)] for p in readable} == {"blobs", "views"}


async def test_I12_the_hubs_token_is_not_sent_with_redirected_files(site: Site) -> None:
    site.make(files := files_of(site.repo))
    site.hub.set_faults(Faults(require_token="hf_secret"))
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher", HF_TOKEN="hf_secret")
        await here.pull_ok("a")
        await here.assert_complete("a", files)
        assert site.hub.stats().authorized_lfs_requests == 0
        assert "hf_secret" not in site["a"]["fetcher"].log()
        await site["a"].restart(here.here, "fetcher")


async def test_I5_pulling_what_is_here_asks_the_hub_nothing(site: Site) -> None:
    site.make(files_of(site.repo))
    async with site.join() as here:
        first = await here.pull_ok("a")
        site.hub.reset_stats()
        again = await here.pull_ok("a")
        assert again.phase == "ready" and again.resumed_bytes == again.total_bytes == first.total_bytes
        assert site.hub.stats().requests.api == 0 and site.hub_bytes() == 0


async def test_I5_the_same_command_twice_runs_once_with_two_replies(site: Site) -> None:
    size = site.make(files := {"model.safetensors": noise(3 * LEAF_BYTES, site.repo)})
    async with site.join() as here:
        identity = site.repo.replace("/", "-")
        first, second = await asyncio.gather(here.pull("a", identity=identity), here.pull("a", identity=identity))
        assert first.ok and first == second
        assert await here.buckets.done.get_as(done_key(identity), Outcome) == first
        assert site.hub_bytes() == size and site.gets("model.safetensors") == 1
        await here.assert_complete("a", files)


async def test_a_plain_publish_is_enough_and_its_outcome_is_kept_by_id(site: Site) -> None:
    site.make(files := {"config.json": site.repo.encode()})
    async with site.join() as here:
        identity, body = site.repo.replace("/", "-"), json.dumps({"model": site.repo}).encode()
        headers = {"Nats-Msg-Id": identity}
        await here.here.client.publish("shoal.v1.cmd.fetcher.a.download", body, headers=headers)
        outcome = await eventually(lambda: here.buckets.done.get_as(done_key(identity), Outcome), "its outcome")
        assert outcome.ok and (outcome.node, outcome.service, outcome.verb) == ("a", "fetcher", "download")
        await here.assert_complete("a", files)


async def test_two_commands_for_one_model_share_its_download(site: Site) -> None:
    size = site.make({"model.safetensors": noise(3 * LEAF_BYTES, site.repo)})
    async with site.join() as here:
        outcomes = await asyncio.gather(here.pull_ok("a"), here.pull_ok("a"), here.pull_ok("a"))
        assert {o.phase for o in outcomes} == {"ready"} and site.hub_bytes() == size


async def test_an_undecodable_command_is_answered_once_and_not_retried(site: Site) -> None:
    async with site.join() as here:
        rejected = asyncio.Event()
        await here.here.client.subscribe("shoal.v1.evt.fetcher.a.rejected", cb=_set(rejected))
        for body in (b"{", b"[]", b'{"model": 7}', b"{}", b"\xff"):
            outcome = await here.ask("a", "download", body)
            assert outcome.error is not None and outcome.error.code == "bad_message", body
        await rejected.wait()
        for name in ("nameonly", "../../etc", "a/b/c", "org/na--me", "org/name@../x", "/"):
            code, message = await here.pull_fails("a", name)
            assert code == "bad_name" and ("org/name" in message or "a branch, a tag or a commit" in message)
        assert site.hub.stats().requests.api == 0


def _set(event: asyncio.Event):  # type: ignore[no-untyped-def]  # what nats-py takes is typed there
    async def arrived(_: object) -> None:
        event.set()

    return arrived


async def test_I9_two_nodes_at_the_same_time_cost_the_hub_one_model(site: Site) -> None:
    size = site.make(files := files_of(site.repo))
    async with site.join() as here:
        states = await asyncio.gather(here.pull_ok("a"), here.pull_ok("b"))
        assert site.hub_bytes() <= FULL * size, (site.hub.stats().files, [s.sources for s in states])
        for node, state in zip("ab", states, strict=True):
            await here.assert_complete(node, files)
            assert sum(state.sources.values()) >= state.total_bytes, "the last leaves may come twice, from nodes"
        assert sum(s.sources.get("hub", 0) for s in states) == site.hub_bytes()
        await here.no_lease_is_left()


async def test_a_later_node_takes_everything_from_a_peer(site: Site) -> None:
    site.make(files := files_of(site.repo))
    async with site.join() as here:
        await here.pull_ok("a")
        site.hub.reset_stats()
        state = await here.pull_ok("b")
        await here.assert_complete("b", files)
        assert state.sources == {"a": state.total_bytes}
        assert site.hub_bytes() == 0 and site.hub.stats().requests.api == 2, "the commit and its listing"


async def test_a_node_that_may_not_ask_the_hub_gets_it_from_a_peer(site: Site) -> None:
    site.make(files := files_of(site.repo))
    async with site.join() as here:
        await here.pull_ok("a")
        site.hub.reset_stats()
        await site["b"].restart(here.here, "fetcher", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
        await here.pull_ok("b")
        await here.assert_complete("b", files)
        await site["b"].restart(here.here, "fetcher")
        requests = site.hub.stats().requests
        assert (requests.api, requests.head, requests.get) == (0, 0, 0)


async def test_a_model_is_pulled_by_commit_from_a_peer_that_has_main(site: Site) -> None:
    site.make(files := files_of(site.repo))
    async with site.join() as here:
        await here.pull_ok("a")
        commit = (await here.manifest("a")).commit
        site.hub.reset_stats()
        await here.pull_ok("b", f"{site.repo}@{commit}")
        await here.assert_complete("b", files)
        assert site.hub_bytes() == 0


async def test_two_models_that_share_blobs_fetch_them_once(site: Site) -> None:
    shared = {f"shared-{i}.safetensors": noise((6 - i) * LEAF_BYTES, f"{site.repo}{i}") for i in range(5)}
    other = site.repo + "-sibling"
    own, others = shared | {"config.json": b"mine" + site.repo.encode()}, shared | {"config.json": b"other"}
    site.make(own)
    site.make(others, other)
    async with site.join() as here:
        states = await asyncio.gather(here.pull_ok("a"), here.pull_ok("a", other))
        await here.assert_complete("a", own)
        await here.assert_complete("a", others, other)
        large = sum(map(len, shared.values()))
        sent = site.hub_bytes() + site.hub_bytes(other)
        assert sent == large + len(own["config.json"]) + len(others["config.json"])
        assert all(s.done_bytes == s.total_bytes for s in states)
        assert "reserving again" not in site["a"]["fetcher"].log()


async def test_of_many_small_files_only_a_few_arrive_at_a_time(site: Site) -> None:
    size = site.make(files := {f"d{i % 7}/{i}.json": noise(100 + i, f"{site.repo}{i}") for i in range(150)})
    hub_port = int(site.hub.base_url.rpartition(":")[2])
    most = 0
    async with site.join() as here:
        await site["a"].restart(here.here, "fetcher")  # without the idle connections of other tests
        fetcher = psutil.Process(site["a"]["fetcher"].pid)
        pull = asyncio.create_task(here.pull_ok("a"))
        while not pull.done():
            to_hub = [c for c in fetcher.net_connections() if c.raddr and c.raddr.port == hub_port]
            most = max(most, len([c for c in to_hub if c.status == psutil.CONN_ESTABLISHED]))
            await asyncio.wait({pull}, timeout=0.05)
        assert (await pull).done_bytes == size == site.hub_bytes()
        await here.assert_complete("a", files)
    assert 2 <= most <= MAX_CONCURRENT_BLOBS + 2  # and the listing's own


async def test_blobs_of_an_incomplete_model_are_served_to_others(site: Site) -> None:
    site.make(files := {"1.safetensors": noise(2 * LEAF_BYTES, site.repo), "2.safetensors": noise(7, site.repo)})
    site.hub.set_faults(Faults(bytes_per_s=LEAF_BYTES))
    async with site.join() as here:
        pulls = [await here.begin("a"), await here.begin("b")]
        await here.state("a", lambda s: bool(s.blobs))
        site.hub.set_faults(Faults())
        assert all(o.ok for o in await asyncio.gather(*pulls))
        await here.assert_complete("b", files)
        assert site.hub_bytes() == 2 * LEAF_BYTES + 7
        assert len(blobs(site["b"])) >= 2
