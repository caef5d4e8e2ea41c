"""Events of a download: started, rejected, failed, paused, and another source for a file."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

from nats.js.errors import NotFoundError

from shoal_common.bus import subjects
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults, UnavailableFault
from tests.fetcher.fault_servers import Asked, serving
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.fetcher.service.test_peers import LIAR, claiming
from tests.fetcher.service.test_source_switch import answer_to
from tests.harness.waiting import eventually


async def emitted(here: Pulls, node: str, name: str) -> list[dict[str, Any]]:
    """Return the events of this name for the test's model, without their time."""
    subject, found, after = subjects.event("fetcher", node, name), list[dict[str, Any]](), 0
    while True:
        try:
            message = await here.here.js.get_msg("EVT", seq=after + 1, subject=subject, next=True)
        except NotFoundError:
            return found
        after = message.seq or 0
        fields = json.loads(message.data or b"")
        assert fields.pop("at_s") > 0
        if fields["model"] == here.site.repo:
            found.append(fields)


async def the_event(here: Pulls, node: str, name: str) -> dict[str, Any]:
    """Wait for the only event of this name for the test's model."""

    async def poll() -> list[dict[str, Any]]:
        return await emitted(here, node, name)

    (event,) = await eventually(poll, f"{name} is emitted")
    return event


async def test_a_started_download_is_emitted_with_size_and_source(site: Site) -> None:
    size = site.make({"model.safetensors": noise(2 * LEAF_BYTES, site.repo), "config.json": b"{}"})
    async with site.join() as here:
        await here.pull_ok("a")
        assert await the_event(here, "a", "download_started") == {
            "model": site.repo,
            "size_bytes": size,
            "source": "hub",
        }
        await here.pull_ok("b")
        assert (await the_event(here, "b", "download_started"))["source"] == "a"
        await here.pull_ok("b")
        assert len(await emitted(here, "b", "download_started")) == 1, "all of it was present"
        for name in ("download_failed", "download_rejected", "download_paused", "download_source_changed"):
            assert await emitted(here, "a", name) == [] == await emitted(here, "b", name)


async def test_a_rejected_download_is_emitted_with_its_figures(site: Site) -> None:
    site.make({"model.safetensors": noise(2 * LEAF_BYTES, site.repo)})
    async with site.join() as here:
        await site["a"].restart(here.here, "storage", SHOAL_MAX_STORAGE_BYTES="1000")
        _, message = await here.pull_fails("a")
        event = await the_event(here, "a", "download_rejected")
        assert (event["model"], event["message"]) == (site.repo, message)
        assert (event["needed_bytes"], event["quota_bytes"]) == (2 * LEAF_BYTES, 1000) and event["free_bytes"] > 0
        assert await emitted(here, "a", "download_failed") == await emitted(here, "a", "download_started") == []
        await site["a"].restart(here.here, "storage")


async def test_a_download_that_fails_emits_its_error(site: Site) -> None:
    site.hub.set_faults(Faults(unavailable=UnavailableFault(times=None)))
    async with site.join() as here:
        code, message = await here.pull_fails("a")
        event = await the_event(here, "a", "download_failed")
        assert event == {"model": site.repo, "code": code, "message": message} and code == "hub_unavailable"
        assert await emitted(here, "a", "download_rejected") == []


async def test_a_download_that_a_person_pauses_emits_that(site: Site) -> None:
    site.make({"model.safetensors": noise(8 * LEAF_BYTES, site.repo)})
    site.hub.set_faults(Faults(bytes_per_s=4 * LEAF_BYTES))
    async with site.join() as here:
        pull = await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        body = json.dumps({"model": site.repo}).encode()
        assert (await here.ask("a", "pause", body)).ok
        assert not (await pull).ok
        assert await the_event(here, "a", "download_paused") == {"model": site.repo}
        assert (await here.ask("a", "pause", body)).ok
        assert len(await emitted(here, "a", "download_paused")) == 1, "it was paused already"
        assert await emitted(here, "a", "download_failed") == []
        assert (await here.cancel("a")).ok


async def test_a_change_of_a_files_source_is_emitted_once(site: Site) -> None:
    content = noise(8 * LEAF_BYTES, site.repo)
    site.make({"model.safetensors": content})

    async def breaks_off(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(answer_to(asked, content)[: LEAF_BYTES + 1000])
        await writer.drain()
        writer.close()

    async with site.join() as here, serving(breaks_off) as server:
        async with claiming(here, server, [hashlib.sha256(content).hexdigest()]):
            pull = await here.begin("a")
            await here.state("a", lambda s: s.sources.get(LIAR, 0) >= LEAF_BYTES)
        # Now only the hub has it.
        assert (await pull).ok
        assert await the_event(here, "a", "download_source_changed") == {
            "model": site.repo,
            "file": "model.safetensors",
            "from": LIAR,
            "to": "hub",
        }
