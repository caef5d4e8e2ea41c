"""A silent source is left, the state names it, and no pull waits for it without need."""

from __future__ import annotations

import asyncio
import hashlib

from shoal_common.store.bitmap import LEAF_BYTES
from tests.fetcher.fault_servers import Asked, serving
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Site
from tests.fetcher.service.test_peers import LIAR, claiming

LEAVES = 8
BYTES = LEAVES * LEAF_BYTES


def answer_to(asked: Asked, content: bytes) -> bytes:
    """Return the requested range of these bytes."""
    first, last = (int(at) for at in asked.headers["range"].removeprefix("bytes=").split("-"))
    body = content[first : last + 1]
    head = (
        f"HTTP/1.1 206 X\r\ncontent-length: {len(body)}\r\ncontent-range: bytes {first}-{last}/{len(content)}\r\n\r\n"
    )
    return head.encode() + body


async def test_a_stalled_peer_is_left_and_named_and_its_bytes_kept(site: Site) -> None:
    content = noise(BYTES, site.repo)
    site.make(files := {"model.safetensors": content})

    async def stall(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(answer_to(asked, content)[: LEAF_BYTES + 1000])

    async with site.join() as here, serving(stall) as server:
        async with claiming(here, server, [hashlib.sha256(content).hexdigest()]):
            pull = await here.begin("a")
            await here.state("a", lambda s: s.source_switches == {LIAR: 1}, deadline_s=60)
        # Now only the hub has it.
        assert (await pull).ok
        done = await here.state_now("a")
        assert done is not None and done.source_switches == {LIAR: 1}
        assert done.sources == {LIAR: LEAF_BYTES, "hub": BYTES - LEAF_BYTES}
        assert site.hub_bytes() == BYTES - LEAF_BYTES
        await here.assert_complete("a", files)


async def test_a_pull_does_not_wait_for_a_stalled_peer_with_another(site: Site) -> None:
    content = noise(BYTES, site.repo)
    site.make(files := {"model.safetensors": content})

    async def stall(_: Asked, writer: asyncio.StreamWriter) -> None:
        await writer.drain()

    async with site.join() as here, serving(stall) as server:
        await here.pull_ok("b")
        site.hub.reset_stats()
        async with claiming(here, server, [hashlib.sha256(content).hexdigest()]):
            assert (await here.pull("a")).ok
        done = await here.state_now("a")
        assert done is not None and done.sources == {"b": BYTES}
        assert site.hub_bytes() == 0
        await here.assert_complete("a", files)
