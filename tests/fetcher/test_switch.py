"""A source that sends nothing is left for one that does, and the person sees which one it was."""

from __future__ import annotations

import asyncio
import hashlib
from itertools import count

from shoal_common.layout import LEAF_BYTES
from shoal_fetcher.decide import FromPeer, Holding, Setbacks, choose
from tests.fetcher.pulling import Site
from tests.fetcher.repos import noise
from tests.fetcher.servers import Asked, serving
from tests.fetcher.test_peers import LIAR, claiming

BYTES = 2 * LEAF_BYTES


def preferred_to_b(repo: str) -> bytes:
    """A file that node a asks the silent one for first."""
    for attempt in count():
        content = noise(BYTES, f"{repo}{attempt}")
        blob = hashlib.sha256(content).hexdigest()
        if choose(blob, [Holding("b", blob), Holding(LIAR, blob)], None, "a", Setbacks(), {}) == FromPeer(LIAR, blob):
            return content
    raise AssertionError("not reached")


async def test_a_peer_that_falls_silent_is_left_for_another_and_the_state_names_it(site: Site) -> None:
    content = preferred_to_b(site.repo)
    site.make(files := {"model.safetensors": content})

    async def falls_silent(_: Asked, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 206 X\r\ncontent-length: {BYTES}\r\ncontent-range: bytes 0-{BYTES - 1}/{BYTES}\r\n\r\n"
        writer.write(head.encode() + content[: LEAF_BYTES + 1000])

    async with site.join() as here, serving(falls_silent) as server:
        await here.pull_ok("b")
        site.hub.reset_stats()
        async with claiming(here, server, [hashlib.sha256(content).hexdigest()]):
            pull = await here.begin("a")
            left = await here.state("a", lambda s: LIAR in s.switched, deadline_s=60)
            assert left.switched == {LIAR: 1} and left.done_bytes >= LEAF_BYTES, "what it gave is kept"
            assert (await pull).ok
        done = await here.state_now("a")
        assert done is not None and done.switched == {LIAR: 1} and done.sources["b"] == LEAF_BYTES
        assert site.hub_bytes() == 0
        await here.is_whole("a", files)
