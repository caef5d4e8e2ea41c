"""kill -9 of any process in the middle of a pull: it completes, and durable leaves are not fetched again (I6)."""

from __future__ import annotations

import asyncio
import signal

import pytest
from nats.aio.msg import Msg

from shoal_common.bus.cluster_lease import LeaseValue
from shoal_common.bus.keys import origin_key
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_demo.faults import Faults
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.harness.waiting import eventually

SLOW = Faults(bytes_per_s=4 * LEAF_BYTES)
SLOW_AHEAD_BYTES = 8 * LEAF_BYTES
"""Bytes that a slow hub may have sent into sockets that nobody reads any more."""


def two_files(seed: str) -> dict[str, bytes]:
    """A file that is soon complete, and one that takes a while."""
    return {"1.safetensors": noise(LEAF_BYTES // 2, seed), "2.safetensors": noise(10 * LEAF_BYTES, seed + "2")}


async def in_the_middle(here: Pulls, node: str = "a") -> DownloadState:
    """Return once the small file is complete and the large one has durable leaves."""
    return await here.state(
        node, lambda s: s.phase == "fetching" and len(s.blobs) == 1 and s.done_bytes > 2 * LEAF_BYTES
    )


async def ready(here: Pulls, node: str = "a") -> DownloadState:
    return await here.state(node, lambda s: s.phase == "ready", deadline_s=40.0)


async def test_I6_a_killed_fetcher_resumes_and_reports_what_it_kept(site: Site) -> None:
    size = site.make(files := two_files(site.repo))
    site.hub.set_faults(SLOW)
    async with site.join() as here:
        pull = await here.begin("a")
        killed_at = await in_the_middle(here)
        site["a"]["fetcher"].kill()
        sent_before = site.hub_bytes()
        site.hub.set_faults(Faults())
        await site["a"].restart(here.here, "fetcher")
        state = await ready(here)
        await here.assert_complete("a", files)
        assert state.resumed_bytes >= killed_at.done_bytes
        assert state.resumed_bytes + site.hub_bytes() - sent_before == size
        assert site.gets("1.safetensors") == 1
        assert state.started_at_s == killed_at.started_at_s
        pull.cancel()


async def test_I6_a_stopped_fetcher_pauses_and_its_successor_resumes(site: Site) -> None:
    size = site.make(files := two_files(site.repo))
    site.hub.set_faults(SLOW)
    async with site.join() as here:
        identity = site.repo.replace("/", "-")
        pull = asyncio.create_task(here.pull("a", identity=identity))
        await in_the_middle(here)
        assert await asyncio.to_thread(site["a"]["fetcher"].stop) == 0
        sent_before = site.hub_bytes()
        site.hub.set_faults(Faults())
        await site["a"].restart(here.here, "fetcher")
        state = await ready(here)
        await here.assert_complete("a", files)
        assert state.resumed_bytes + site.hub_bytes() - sent_before == size
        # The command was redelivered and continued: its sender finds the outcome under its id.
        outcome = await eventually(lambda: here.buckets.done.get_as(identity, Outcome), "the command has ended")
        assert outcome.ok and outcome.result["phase"] == "ready"
        pull.cancel()


async def test_I6_storage_killed_in_the_middle_of_a_pull(site: Site) -> None:
    size = site.make(files := two_files(site.repo))
    site.hub.set_faults(SLOW)
    async with site.join() as here:
        pull = await here.begin("a")
        await in_the_middle(here)
        await site["a"].restart(here.here, "storage")
        site.hub.set_faults(Faults())
        assert (await pull).ok
        await here.assert_complete("a", files)
        assert site.hub_bytes() == size


async def test_I6_storage_killed_before_its_answer_is_asked_again(site: Site) -> None:
    size = site.make(files := two_files(site.repo))
    async with site.join() as here:
        asked = asyncio.Event()

        async def arrived(_: Msg) -> None:
            asked.set()

        watching = await here.here.client.subscribe("shoal.v1.svc.storage.a.reserve", cb=arrived)
        await here.here.client.flush()
        site["a"]["storage"].send(signal.SIGSTOP)
        pull = await here.begin("a")
        await asked.wait()
        await watching.unsubscribe()  # or NATS would take the test for somebody who answers
        await site["a"].restart(here.here, "storage")
        assert (await pull).ok
        await here.assert_complete("a", files)
        assert site.hub_bytes() == size


@pytest.mark.parametrize("service", ["fetcher", "storage", "fileserver"])
async def test_I9_a_killed_service_of_the_source_costs_the_hub_nothing(site: Site, service: str) -> None:
    """b fetches a large model from a; a's service dies and is restarted at once, as the supervisor does."""
    size = site.make(files := {"1.safetensors": noise(96 * LEAF_BYTES, "large"), "c.json": site.repo.encode()})
    async with site.join() as here:
        await here.pull_ok("a")
        site.hub.reset_stats()
        pull = await here.begin("b")
        await here.state("b", lambda s: s.phase == "fetching")
        await site["a"].restart(here.here, service)
        outcome = await pull
        assert outcome.ok, outcome.error
        await here.assert_complete("b", files)
        assert site.hub_bytes() == 0
        state = await here.state_now("b")
        assert state is not None and state.sources["a"] >= size
        for node in "ab":
            assert (await here.delete(node)).ok


async def test_I6_nats_restarted_in_the_middle_of_a_pull(site: Site) -> None:
    size = site.make(files := two_files(site.repo))
    site.hub.set_faults(SLOW)
    async with site.join() as here:
        pull = await here.begin("a")
        await in_the_middle(here)
        await asyncio.to_thread(site.server.restart)
        site.hub.set_faults(Faults())
        await ready(here)
        await here.assert_complete("a", files)
        assert site.hub_bytes() <= size + 2 * LEAF_BYTES
        pull.cancel()


async def test_I9_a_killed_origin_is_replaced_and_refetches_nothing(
    site: Site,
) -> None:
    size = site.make(files := {"model.safetensors": noise(24 * LEAF_BYTES, site.repo)})
    site.hub.set_faults(SLOW)
    async with site.join() as here:
        first = await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        second = await here.begin("b")
        relayed = await here.state("b", lambda s: s.sources.get("a", 0) >= 2 * LEAF_BYTES)
        assert "hub" not in relayed.sources and relayed.phase == "fetching", "it was passed on before it was whole"
        site["a"]["fetcher"].kill()
        site.hub.set_faults(Faults())
        assert (await second).ok
        await here.assert_complete("b", files)
        state = await here.state_now("b")
        # Only what was on its way from the hub to the dead origin is lost.
        assert state is not None and state.sources["hub"] < size - LEAF_BYTES
        assert site.hub_bytes() <= size + SLOW_AHEAD_BYTES
        sent = site.hub_bytes()
        # a continues with its leaves and fetches the rest from b, with no byte from the hub.
        await site["a"].restart(here.here, "fetcher")
        state = await ready(here)
        await here.assert_complete("a", files)
        assert state.resumed_bytes > 0 and state.sources["b"] >= size - state.resumed_bytes
        assert site.hub_bytes() == sent
        first.cancel()


async def test_a_node_that_comes_back_regains_its_origin_lease(site: Site) -> None:
    site.make(files := {"model.safetensors": noise(24 * LEAF_BYTES, site.repo)})
    site.hub.set_faults(SLOW)
    async with site.join() as here:
        pull = await here.begin("a")
        await here.durable("a", LEAF_BYTES)
        blob = next(iter(p.name for p in site["a"].layout.partials.iterdir()))
        assert await here.buckets.lease.get_as(origin_key(blob), LeaseValue) is not None
        site["a"]["fetcher"].kill()
        await site["a"].restart(here.here, "fetcher")
        began_s = asyncio.get_running_loop().time()
        await here.state("a", lambda s: s.phase == "fetching" and s.speed_bytes_per_s > 0)
        assert asyncio.get_running_loop().time() - began_s < 5
        site.hub.set_faults(Faults())
        await ready(here)
        await here.assert_complete("a", files)
        pull.cancel()
