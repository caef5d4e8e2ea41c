"""Pause, resume and cancel: their answers, what they keep, and that only a person undoes a pause."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import msgspec

from shoal_common.bus import subjects
from shoal_common.bus.keys import done_key, download_key, storage_key
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.storage import StorageState
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site, partials
from tests.harness.waiting import eventually

BIG_BYTES = 12 * LEAF_BYTES
SLOWLY = Faults(bytes_per_s=2 * LEAF_BYTES)


async def control(here: Pulls, node: str, verb: str, model: str | None = None) -> str:
    """Return a node's answer to pause or resume for this test's model."""
    body = {"model": here.site.repo if model is None else model}
    outcome = await here.ask(node, verb, json.dumps(body).encode())
    assert outcome.ok, outcome.error
    return str(outcome.result["models"].get(here.site.repo, ""))


async def download_spec(here: Pulls, node: str) -> DownloadRequest | None:
    return await here.buckets.spec.get_as(download_key(node, here.site.repo), DownloadRequest)


async def storage_of(here: Pulls, node: str, wanted: Callable[[StorageState], bool]) -> StorageState:
    """Wait for a storage state of a node that satisfies the condition."""

    async def matching_state() -> StorageState | None:
        found = await here.buckets.state.get_as(storage_key(node), StorageState)
        return found if found is not None and wanted(found) else None

    return await eventually(matching_state, f"storage of {node} says so", 45)


async def test_a_pause_ends_a_waiting_pull_and_resume_fetches_the_rest(site: Site) -> None:
    size = site.make(files := {"model.safetensors": noise(BIG_BYTES, site.repo)})
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        waiting = await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        assert await control(here, "a", "pause") == "paused"
        outcome = await waiting
        assert not outcome.ok and outcome.error is not None and outcome.error.code == "paused"
        assert f"`shoal resume {site.repo}` continues it" in outcome.error.message
        paused = await here.state_now("a")
        assert paused is not None and paused.phase == "paused" and paused.done_bytes >= LEAF_BYTES
        assert (paused.speed_bytes_per_s, paused.source_speeds, paused.eta_s) == (0, {}, None)
        assert await control(here, "a", "pause") == "was_paused" and await control(here, "b", "pause") == "unknown"
        # Its bytes, and the reservation of the others, are kept and published.
        kept = await storage_of(here, "a", lambda s: bool(s.paused_downloads))
        assert kept.paused_downloads == {f"{site.repo}@{paused.commit}": size} and kept.reserved_bytes == size
        site.hub.set_faults(Faults())
        assert await control(here, "a", "resume") == "resumed"
        assert await control(here, "a", "resume") in ("under_way", "ready")
        done = await here.state("a", lambda s: s.phase == "ready")
        assert done.resumed_bytes == paused.done_bytes and done.verified_bytes == done.done_bytes == size
        assert 0 < done.resumed_bytes < done.total_bytes
        await here.assert_complete("a", files)
        assert (await storage_of(here, "a", lambda s: not s.paused_downloads)).reserved_bytes == 0
        assert await control(here, "a", "resume") == "ready"


async def test_no_bytes_move_while_paused_whatever_else_happens(site: Site) -> None:
    site.make({"model.safetensors": noise(BIG_BYTES, site.repo)})
    other = {"model.safetensors": noise(BIG_BYTES, site.repo + "other")}
    site.make(other, f"{site.repo}-other")
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        await control(here, "a", "pause")
        site.hub.set_faults(Faults())
        paused = await here.state_now("a")
        # Meanwhile twice as much as is missing passes the same way; buffers that were full have long been emptied.
        await here.pull_ok("a", f"{site.repo}-other")
        sent, gets = site.hub_bytes(), site.gets("model.safetensors")
        await here.pull_ok("b", f"{site.repo}-other")
        assert (site.hub_bytes(), site.gets("model.safetensors")) == (sent, gets)
        assert await here.state_now("a") == paused, "and nothing is written of it"
        assert (await here.cancel("a")).result == {"cancelled": True, "was": "paused"}
        await here.nothing_is_left("a")


async def test_only_a_person_who_resumes_or_pulls_ends_a_pause(
    site: Site,
) -> None:
    site.make(files := {"model.safetensors": noise(BIG_BYTES, site.repo)})
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        await control(here, "a", "pause")
        site.hub.set_faults(Faults())
        for service in ("fetcher", "storage", "fileserver"):
            await site["a"].restart(here.here, service)
        await site["b"].restart(here.here, "fileserver")
        # The stage manager asks by itself, like this.
        body = json.dumps({"model": site.repo, "keep_paused": True}).encode()
        outcome = await here.ask("a", "download", body)
        assert outcome.error is not None and outcome.error.code == "paused"
        request, state = await download_spec(here, "a"), await here.state_now("a")
        assert request is not None and request.paused and state is not None and state.phase == "paused"
        assert (await here.pull_ok("a")).resumed_bytes >= LEAF_BYTES
        await here.assert_complete("a", files)


async def test_I6_a_kill_during_a_pause_leaves_it_paused_and_published(site: Site) -> None:
    site.make({"model.safetensors": noise(BIG_BYTES, site.repo)})
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        await here.begin("a")
        state = await here.durable("a", LEAF_BYTES)
        site["a"]["fetcher"].kill()
        request = await download_spec(here, "a")
        assert request is not None and len(request.commands) == 1
        key = download_key("a", site.repo)
        await here.buckets.spec.put(key, msgspec.structs.replace(request, paused=True, commands=[]))
        site["a"]["fetcher"].start()
        await site["a"].ready(here.here, "fetcher")
        published = await here.state("a", lambda s: s.phase == "paused")
        assert published.commit == state.commit
        # The same for a rejected download, killed before its request was deleted: it is not retried.
        site["a"]["fetcher"].kill()
        ended = msgspec.structs.replace(published, phase="rejected", updated_at_s=request.requested_at_s + 1)
        await here.buckets.state.put(key, ended)
        await here.buckets.spec.put(key, request)
        site.hub.reset_stats()
        site["a"]["fetcher"].start()
        await site["a"].ready(here.here, "fetcher")
        assert await download_spec(here, "a") is None and await here.state_now("a") == ended
        assert site.hub.stats().requests.api == 0
        await here.cancel("a")
        await here.nothing_is_left("a")


async def test_an_old_command_of_a_killed_fetcher_undoes_no_later_one(site: Site) -> None:
    site.make({"model.safetensors": noise(BIG_BYTES, site.repo)})
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        for verb, code in (("pause", "paused"), ("cancel", "cancelled")):
            identity = f"{site.repo.replace('/', '-')}-{verb}"
            await here.here.client.publish(
                subjects.command("fetcher", "a", "download"),
                json.dumps({"model": site.repo}).encode(),
                headers={"Nats-Msg-Id": identity},
            )
            await here.durable("a", LEAF_BYTES)
            await site["a"].restart(here.here, "fetcher")
            await here.ask("a", verb, json.dumps({"model": site.repo}).encode())
            # Before redelivery it has its answer, which is all that it will get then.
            answer = await here.buckets.done.get_as(done_key(identity), Outcome)
            assert answer is not None and answer.error is not None and answer.error.code == code
        await here.nothing_is_left("a")


async def test_all_of_a_node_is_paused_and_resumed_at_once(site: Site) -> None:
    repos = [f"{site.repo}-{n}" for n in range(3)]
    for repo in repos:
        site.make({"model.safetensors": noise(4 * LEAF_BYTES, repo)}, repo)
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        for repo in repos:
            await here.begin("a", repo)
        await asyncio.gather(*(here.state("a", lambda s: s.phase == "fetching", repo) for repo in repos))
        outcome = await here.ask("a", "pause", b"{}")
        assert outcome.result == {"models": dict.fromkeys(repos, "paused")}
        site.hub.set_faults(Faults())
        outcome = await here.ask("a", "resume", b"{}")
        assert outcome.result == {"models": dict.fromkeys(repos, "resumed")}
        for repo in repos:
            await here.state("a", lambda s: s.phase == "ready", repo, 45)

        async def nothing_is_requested() -> bool:
            return not [repo for repo in repos if await here.buckets.spec.get(download_key("a", repo))]

        await eventually(nothing_is_requested, "the requests of ready models are deleted")
        assert (await here.ask("a", "pause", b"{}")).result == {"models": {}}


async def test_cancelling_a_tag_leaves_the_paused_branch_of_it_alone(site: Site) -> None:
    site.make(files := {"model.safetensors": noise(BIG_BYTES, site.repo)})
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        await here.begin("a")
        commit = (await here.durable("a", LEAF_BYTES)).commit
        await control(here, "a", "pause")
        await here.begin("a", named := f"{site.repo}@{commit}")
        await here.durable("a", LEAF_BYTES, named)
        assert (await here.cancel("a", named)).result["cancelled"] is True
        site.hub.set_faults(Faults())
        assert partials(site["a"]), "they are the paused one's too"
        assert await control(here, "a", "resume") == "resumed"
        done: DownloadState = await here.state("a", lambda s: s.phase == "ready")
        assert done.resumed_bytes >= LEAF_BYTES
        await here.assert_complete("a", files)


async def test_I5_concurrent_commands_all_get_replies_the_last_wins(site: Site) -> None:
    site.make({"model.safetensors": noise(BIG_BYTES, site.repo)})
    site.hub.set_faults(SLOWLY)
    async with site.join() as here:
        waiting = await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        verbs = ["pause", "resume", "pause", "cancel", "resume", "pause", "cancel"] * 3
        body = json.dumps({"model": site.repo}).encode()
        ids = [f"{site.repo.replace('/', '-')}-{i}" for i in range(len(verbs))]
        asking = (here.ask("a", verb, body, i) for verb, i in zip(verbs, ids, strict=True))
        outcomes: list[Any] = await asyncio.gather(*asking)
        assert all(o.ok for o in outcomes)
        assert [o.result["cancelled"] for o in outcomes if o.verb == "cancel"].count(True) == 1
        outcome = await waiting
        assert outcome.error is not None and outcome.error.code in ("paused", "cancelled")
        assert await download_spec(here, "a") is None and await here.state_now("a") is None
        await here.nothing_is_left("a")
