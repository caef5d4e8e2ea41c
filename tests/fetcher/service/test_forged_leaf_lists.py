"""A node that forges a leaf list: valid leaves of garbage under the sha256 of a true blob (docs/transfer.md)."""

from __future__ import annotations

import asyncio
import re

from shoal_common.bus.keys import download_key
from shoal_common.messages.downloads import DownloadState
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_hash
from tests.fetcher.fault_servers import Answer, Asked, reply, serving
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Site
from tests.fetcher.service.test_peers import LIAR, blob_of, claiming
from tests.fetcher.service.test_swarm import giving

FILE = "model.safetensors"


def leaves_of(content: bytes) -> bytes:
    return b"".join(leaf_hash(content[at : at + LEAF_BYTES]) for at in range(0, len(content), LEAF_BYTES))


def forging(garbage: bytes) -> Answer:
    """A fileserver that sends garbage for a blob, and the leaf list that fits it."""
    hashes, leaves = leaves_of(garbage), giving(garbage, bytes)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if not asked.path.startswith("/v1/leaves/"):
            return await leaves(asked, writer)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers["range"])
        assert match
        first, last = int(match[1]), int(match[2])
        writer.write(reply(206, hashes[first : last + 1], content_range=f"bytes {first}-{last}/{len(hashes)}"))

    return answer


async def test_I1_with_none_a_forged_leaf_list_makes_no_blob(site: Site) -> None:
    size = site.make(files := {FILE: noise(5 * LEAF_BYTES + 9, site.repo)})
    garbage = noise(size, "garbage")
    async with site.join() as here, serving(forging(garbage)) as server:
        await here.pull_ok("a")
        blob = await blob_of(here, FILE)
        assert (await here.delete("a")).ok
        site.hub.reset_stats()
        try:
            await site["b"].restart(here.here, "storage", SHOAL_TRUST_SEALERS="none")
            async with claiming(here, server, [blob]):
                claim = DownloadState(
                    node=LIAR,
                    model=site.repo,
                    phase="fetching",
                    blobs=[blob],
                    leaf_list_digests={blob: hash_leaf_list(leaves_of(garbage))},
                )
                await here.buckets.state.put(download_key(LIAR, site.repo), claim)
                state = await here.pull_ok("b")
            assert "leaf list does not count; hashing by sha256" in site["b"]["storage"].log()
        finally:
            await site["b"].restart(here.here, "storage")
        await here.assert_complete("b", files)
        assert state.sources[LIAR] >= size and state.sources["hub"] == size == site.hub_bytes()
