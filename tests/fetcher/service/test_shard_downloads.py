"""Some layers of a model: pausing, resuming and asking for more work as with whole models, for all callers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import msgspec
import pytest

from shoal_common.bus.keys import download_key, shard_key
from shoal_common.messages.downloads import DownloadRequest, DownloadState
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.storage import ShardState
from shoal_common.names import model_id
from shoal_common.store.bitmap import LEAF_BYTES
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.fetcher.service.test_pause_and_resume import control
from tests.fetcher.service.test_rate_limits import limit
from tests.fetcher.unit.test_leaf_selection import CONFIG, NAMES, header
from tests.harness.waiting import eventually

SLOWLY = {"max_peer_bytes_per_s": LEAF_BYTES}


@pytest.fixture(autouse=True)
def unlimited(site: Site) -> Iterator[None]:
    """Reset rate limits that a failed test may leave."""
    yield

    async def lift() -> None:
        async with site.join() as here:
            await limit(here, "a", max_peer_bytes_per_s=None)

    asyncio.run(lift())


async def at_b(here: Pulls) -> dict[str, bytes]:
    """A model of four layers, complete on b; a is to fetch it slowly."""
    sizes = {name: 2 * LEAF_BYTES if "proj" in name else 1000 for name in NAMES}
    weights = header(sizes) + noise(sum(sizes.values()), here.site.repo)
    here.site.make(files := {"model.safetensors": weights, "config.json": json.dumps(CONFIG).encode()})
    await here.pull_ok("b")
    await limit(here, "a", **SLOWLY)
    return files


async def begin(here: Pulls, layers: list[int], keep_paused: bool = False) -> asyncio.Task[Outcome]:
    """Request these layers on a, without waiting for them; the request is stored on return."""
    body = {"model": here.site.repo, "layers": layers, "keep_paused": keep_paused}
    request = await download_spec(here)
    before = len(request.commands) if request else 0
    task = asyncio.create_task(here.ask("a", "download", json.dumps(body).encode()))

    async def is_kept() -> bool:
        request = await download_spec(here)
        return task.done() or (request is not None and len(request.commands) > before)

    await eventually(is_kept, "the request is kept")
    return task


async def download_spec(here: Pulls) -> DownloadRequest | None:
    return await here.buckets.spec.get_as(download_key("a", here.site.repo), DownloadRequest)


async def published_shard(here: Pulls) -> ShardState | None:
    """Return the published shard on a."""
    at_b = await here.state_now("b")
    assert at_b is not None
    return await here.buckets.state.get_as(shard_key("a", model_id(here.site.repo, at_b.commit)), ShardState)


async def ready(task: asyncio.Task[Outcome]) -> DownloadState:
    outcome = await task
    assert outcome.ok, outcome.error
    return msgspec.convert(outcome.result, DownloadState)


async def test_paused_layers_stay_the_same_over_restart_and_resume(site: Site) -> None:
    async with site.join() as here:
        await at_b(here)
        waiting = await begin(here, [0, 2])
        await here.durable("a", LEAF_BYTES)
        assert await control(here, "a", "pause") == "paused"
        error = (await waiting).error
        assert error is not None and error.code == "paused"
        await limit(here, "a", max_peer_bytes_per_s=None)
        refused = (await (await begin(here, [2, 4], keep_paused=True))).error
        assert refused is not None and refused.code == "paused"
        await site["a"].restart(here.here, "fetcher")
        request, state = await download_spec(here), await here.state_now("a")
        assert request is not None and (request.paused, request.layers) == (True, [[0, 2]])
        assert state is not None and (state.phase, state.layers) == ("paused", [[0, 2]])
        assert await control(here, "a", "resume") == "resumed"
        done = await here.state("a", lambda s: s.phase == "ready")
        published = await published_shard(here)
        assert published is not None and published.layers == done.layers == [[0, 2]]
        assert (await here.cancel("a")).result["cancelled"] is False
        assert (await here.delete("a")).ok and await published_shard(here) is None
        await here.nothing_is_left("a")


async def test_waiters_for_layers_hear_the_end_of_the_extended_fetch(site: Site) -> None:
    async with site.join() as here:
        await at_b(here)
        first = await begin(here, [0, 2])
        await here.durable("a", LEAF_BYTES)
        second = await begin(here, [2, 3])
        within = await begin(here, [1, 2])
        request = await download_spec(here)
        assert request is not None and request.layers == [[0, 3]] and len(request.commands) == 3
        assert await control(here, "a", "pause") == "paused"
        for waiting in (first, second, within):
            error = (await waiting).error
            assert error is not None and error.code == "paused"
        # A request for one more layer, as from a person, resumes all of them.
        again = await begin(here, [1, 4])
        await limit(here, "a", max_peer_bytes_per_s=None)
        assert (await ready(again)).layers == [[0, 4]]
        published = await published_shard(here)
        assert published is not None and published.layers == [[0, 4]]
        assert (await here.delete("a")).ok


async def test_a_full_pull_takes_over_the_layers_in_flight(site: Site) -> None:
    async with site.join() as here:
        files = await at_b(here)
        waiting = await begin(here, [0, 2])
        before = await here.durable("a", LEAF_BYTES)
        pulling = asyncio.create_task(here.pull("a"))
        await here.state("a", lambda s: not s.layers)
        await limit(here, "a", max_peer_bytes_per_s=None)
        assert (await ready(waiting)) == (await ready(pulling))
        await here.assert_complete("a", files)
        assert await download_spec(here) is None and await published_shard(here) is None
        assert before.layers == [[0, 2]] and site.hub_bytes() <= sum(len(data) for data in files.values())
        # The whole model is here: no layers are needed any more.
        assert (await ready(await begin(here, [2, 4]))).layers == []
