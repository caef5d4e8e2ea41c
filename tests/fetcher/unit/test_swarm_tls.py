"""Leaves inside TLS: only the node that was meant gets a request, whatever answers at its address."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shoal_common.errors import Unavailable
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.tls import server_context
from shoal_common.messages.liveness import NodeAddress
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_fetcher.swarm.http_client import PeerHttpClient
from shoal_fetcher.swarm.peer_client import FileserverClient
from tests.fetcher.fault_servers import reply, serving
from tests.harness.identities import Authority

BLOB, LEAVES = "a" * 64, 5
DATA = random.Random(1).randbytes(LEAVES * LEAF_BYTES)
WHOLE = reply(206, DATA, content_range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}")


class Client:
    """Node a, which knows the nodes b and c at one address."""

    def __init__(self, authority: Authority) -> None:
        self.identity = authority.node("a")
        self.links, self.tokens = PeerLinks(self.identity), authority.tokens(self.identity)

    async def fetched(self, link: NodeAddress, *nodes: str, connect_s: float = 10.0) -> list[bytes]:
        """Fetch the blob from each of these nodes."""
        found = []
        async with PeerHttpClient(self.links, connect_s=connect_s) as http:
            peers = FileserverClient(http, self.tokens, lambda: {node: [link] for node in nodes})
            for node in nodes:
                leaves: dict[int, bytes] = {}

                def took(leaf: int, data: memoryview, done: object, into: dict[int, bytes] = leaves) -> None:
                    into[leaf] = bytes(data)
                    assert callable(done)
                    done()

                await peers.leaves(node, BLOB, len(DATA), 0, LEAVES, took)
                found.append(b"".join(leaves[n] for n in sorted(leaves)))
        return found


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "nodes")
    for node in "bc":
        made.node(node)
    return made


async def test_leaves_arrive_inside_tls_as_they_are(authority: Authority) -> None:
    async with serving(WHOLE, server_context(authority.node("b"))) as server:
        assert await Client(authority).fetched(server.link, "b", "b") == [DATA, DATA]
    assert server.asked[0].headers["authorization"].startswith("Shoal a.")


@pytest.mark.parametrize("who", ["another member", "another cluster's b"])
async def test_I12_a_man_in_the_middle_is_sent_nothing(authority: Authority, tmp_path: Path, who: str) -> None:
    middle = authority.node("c") if who == "another member" else Authority(tmp_path / "elsewhere").node("b")
    async with serving(WHOLE, server_context(middle)) as server:
        with pytest.raises(Unavailable, match="does not prove to be node b"):
            await Client(authority).fetched(server.link, "b")
    assert not server.asked


async def test_I12_what_speaks_no_tls_where_it_should_is_sent_nothing(authority: Authority) -> None:
    async with serving(WHOLE) as server:
        with pytest.raises(Unavailable, match="node b timed out"):
            await Client(authority).fetched(NodeAddress(address=server.address, tls=True), "b", connect_s=0.1)
    assert not server.asked


async def test_a_connection_to_one_node_is_not_used_for_another(authority: Authority) -> None:
    async with serving(WHOLE, server_context(authority.node("b"))) as server:
        with pytest.raises(Unavailable, match="does not prove to be node c"):
            await Client(authority).fetched(server.link, "b", "c")
    assert len(server.asked) == 1
