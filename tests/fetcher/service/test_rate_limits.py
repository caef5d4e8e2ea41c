"""Rate limits hold, by the hub's own count: only what was under way arrives until they are lifted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator

import pytest
from msgspec import to_builtins

from shoal_common.bus.keys import storage_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.messages import encode
from shoal_common.messages.storage import StorageState
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_fetcher.rate_limits import MAX_PEERS, RateLimits
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site
from tests.harness.waiting import eventually

BIG_BYTES = 48 * LEAF_BYTES
"""More than all buffers hold between a hub and a fetcher that does not read."""


@pytest.fixture(autouse=True)
def unlimited(site: Site) -> Iterator[None]:
    """Reset rate limits that a failed test may leave."""
    yield

    async def lift() -> None:
        async with site.join() as here:
            await limit(here, "a", max_hub_bytes_per_s=None, max_peer_bytes_per_s=None)

    asyncio.run(lift())


async def limit(here: Pulls, node: str, **settings: int | None) -> None:
    """Change a node's settings, as a person does."""
    outcome = await here.ask(node, "configure", json.dumps(settings).encode(), service="storage")
    assert outcome.ok and settings.items() <= outcome.result.items(), outcome


async def limit_from_start(site: Site, here: Pulls, **settings: int | None) -> None:
    """The same for node a, whose fetcher then starts with these: a running one hears of them some time later."""
    await limit(here, "a", **settings)

    async def published() -> bool:
        state = await here.buckets.state.get_as(storage_key("a"), StorageState)
        return state is not None and settings.items() <= to_builtins(state).items()

    await eventually(published, "the fetcher will read it as it starts")
    await site["a"].restart(here.here, "fetcher")


async def test_a_hub_limit_holds_all_downloads_and_is_lifted_at_once(site: Site) -> None:
    """One byte a second: any byte that passes is wrong. No clock is read."""
    half = BIG_BYTES // 2
    size = site.make(files := {f"{n}.safetensors": noise(half, f"{site.repo}{n}") for n in (1, 2)})
    site.make({"model.safetensors": noise(BIG_BYTES, site.repo + "p")}, f"{site.repo}-by-peer")
    async with site.join() as here:
        await here.pull_ok("b", f"{site.repo}-by-peer")
        await limit_from_start(site, here, max_hub_bytes_per_s=1)
        pull = await here.begin("a")

        async def asked() -> bool:
            return site.gets("1.safetensors") > 0 and site.gets("2.safetensors") > 0

        await eventually(asked, "both files are asked for")
        # Meanwhile as much comes from a peer, which has no limit.
        await here.pull_ok("a", f"{site.repo}-by-peer")
        state = await here.state("a", lambda s: s.phase == "fetching")
        assert state.done_bytes == 0 and sum(state.sources.values()) == 0
        assert site.hub_bytes() < size, "the hub has sent what fits into buffers, and no more"
        await limit(here, "a", max_hub_bytes_per_s=None)
        assert (await pull).ok
        await here.assert_complete("a", files)


async def test_a_peer_limit_is_of_peers_alone(site: Site) -> None:
    site.make(files := {"model.safetensors": noise(4 * LEAF_BYTES, site.repo)})
    site.make({"model.safetensors": noise(4 * LEAF_BYTES, site.repo + "h")}, f"{site.repo}-by-hub")
    async with site.join() as here:
        await here.pull_ok("b")
        await limit_from_start(site, here, max_peer_bytes_per_s=1)
        pull = await here.begin("a")
        await here.state("a", lambda s: s.phase == "fetching")
        await here.pull_ok("a", f"{site.repo}-by-hub")
        state = await here.state_now("a")
        assert state is not None and state.phase == "fetching" and state.done_bytes == 0
        await limit(here, "a", max_peer_bytes_per_s=None)
        assert (await pull).ok
        await here.assert_complete("a", files)


async def test_limits_follow_storages_state_and_stay_bounded() -> None:
    limits, state = RateLimits(), KvMirror("state")
    following = asyncio.create_task(limits.follow_settings(state, "a"))
    known = limits.for_peer("b")
    assert (limits.hub.bytes_per_s, known.bytes_per_s) == (None, None)

    async def publish(hub: int | None, peer: int | None) -> None:
        settings = StorageState(node="a", max_hub_bytes_per_s=hub, max_peer_bytes_per_s=peer)
        state.apply(storage_key("a"), encode(settings))
        await eventually(_async_condition(lambda: limits.hub.bytes_per_s == hub), "it is followed")

    await publish(7, 8)
    assert known is limits.for_peer("b") and known.bytes_per_s == limits.for_peer("c").bytes_per_s == 8
    state.apply(storage_key("b"), encode(StorageState(node="b", max_hub_bytes_per_s=99)))
    state.apply(storage_key("a"), None)
    assert limits.hub.bytes_per_s == 7, "another node's settings, and none, change nothing"
    await publish(None, None)
    assert known.bytes_per_s is None
    paces = {id(limits.for_peer(f"node-{n}")) for n in range(3 * MAX_PEERS)}
    assert len(paces) >= MAX_PEERS and len(limits._peers) == MAX_PEERS
    following.cancel()


def _async_condition(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        return condition()

    return ask
