"""Offline: no connection goes to the hub, and what the cluster has is pulled all the same."""

from __future__ import annotations

import asyncio

from shoal_common.bus.keys import model_key
from shoal_common.messages.storage import ModelState
from shoal_common.names import model_id
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Site


async def test_offline_nothing_connects_and_held_models_are_pulled(
    site: Site,
) -> None:
    site.make(files := {"model.safetensors": noise(2_000_000, site.repo), "config.json": noise(400, site.repo)})
    connections = 0

    async def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, site.join() as here:
        try:
            await here.pull_ok("a")
            commit = (await here.manifest("a")).commit
            site.hub.reset_stats()
            await site["b"].restart(here.here, "fetcher", HF_HUB_OFFLINE="1", HF_ENDPOINT=url)
            await here.pull_ok("b")
            await here.assert_complete("b", files)
            unchecked = await here.buckets.state.get_as(model_key("b", model_id(site.repo, commit)), ModelState)
            assert unchecked is not None and unchecked.unchecked_from == "a", "nobody could ask the hub"
            assert (await here.delete("b")).ok
            await here.pull_ok("b", f"{site.repo}@{commit}")
            code, message = await here.pull_fails("b", f"{site.repo}-nowhere")
            assert code == "hub_unavailable" and "HF_HUB_OFFLINE" in message
            assert connections == 0
            requests = site.hub.stats().requests
            assert (requests.api, requests.head, requests.get) == (0, 0, 0)
        finally:
            await site["b"].restart(here.here, "fetcher")
