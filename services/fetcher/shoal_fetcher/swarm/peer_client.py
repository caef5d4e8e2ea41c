"""Requests to the fileservers of nodes: picks the address, signs the request, records rates."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from shoal_common.bus import cluster_clock
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.identity.seals import SEAL_HEADER
from shoal_common.identity.seals import from_text as seal_from_text
from shoal_common.messages.liveness import NodeAddress
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.names import check_blob
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_set import leaf_range, to_bitmap
from shoal_fetcher.swarm.address_stats import AddressStats
from shoal_fetcher.swarm.http_client import PeerBusy, PeerHttpClient
from shoal_fetcher.swarm.sinks import BodySink, BytesSink, LeafSink, OnLeaf, PeerReply

PAGE_BYTES = 256 << 10
"""Bytes of a leaf list per request: the list of 8 GiB."""


class FileserverClient:
    """The other nodes' fileservers; `addresses()` returns the live ones.

    `lost(node, reason)` is called when a connection breaks or is refused.
    """

    def __init__(
        self,
        client: PeerHttpClient,
        tokens: PeerTokens,
        addresses: Callable[[], dict[str, list[NodeAddress]]],
        on_lost: Callable[[str, str], Awaitable[None]] | None = None,
    ) -> None:
        self._client, self._tokens, self._addresses, self._lost = client, tokens, addresses, on_lost
        self._rates = AddressStats()

    async def leaves(self, node: str, blob: str, size_bytes: int, first: int, end: int, on_leaf: OnLeaf) -> PeerReply:
        """Fetch leaves [first, end) of a blob."""

        def exactly(got_first: int, got_end: int) -> bool:
            return (got_first, got_end) == (first, end)

        byte_range = f"bytes={first * LEAF_BYTES}-{min(end * LEAF_BYTES, size_bytes) - 1}"
        sink = LeafSink(size_bytes, exactly, on_leaf, self._client.buffers)
        headers, most_bytes = {"Range": byte_range}, (end - first) * LEAF_BYTES
        return await self._leaves(node, "GET", f"/v1/blobs/{check_blob(blob)}", headers, sink, most_bytes)

    async def any_leaves(
        self,
        node: str,
        blob: str,
        size_bytes: int,
        leaves: int,
        max_leaves: int,
        on_leaf: OnLeaf,
        chosen: Callable[[int, int], None],
    ) -> PeerReply:
        """Fetch a run that the source chooses among these leaves; `chosen(first, end)` is called once it is known."""

        def fits(first: int, end: int) -> bool:
            if end - first > max_leaves or leaf_range(first, end) & ~leaves:
                return False
            chosen(first, end)
            return True

        sink = LeafSink(size_bytes, fits, on_leaf, self._client.buffers)
        path = f"/v1/blobs/{check_blob(blob)}/any?max_leaves={max_leaves}"
        body = to_bitmap(leaves, -(-size_bytes // LEAF_BYTES))
        return await self._leaves(node, "POST", path, {}, sink, max_leaves * LEAF_BYTES, body)

    async def _leaves(
        self,
        node: str,
        method: str,
        path: str,
        headers: dict[str, str],
        sink: LeafSink,
        most_bytes: int,
        body: bytes = b"",
    ) -> PeerReply:
        try:
            return await self._request(node, method, path, headers, sink, most_bytes, body)
        finally:
            sink.close()

    async def leaf_list(self, node: str, blob: str, start: int, size_bytes: int) -> bytes:
        """Return bytes [start, start + size_bytes) of a leaf list, read in pages."""
        return (await self._leaf_list(node, blob, start, size_bytes))[0]

    async def sealed_leaf_list(self, node: str, blob: str, size_bytes: int) -> tuple[bytes, LeafListSeal | None]:
        """Return a whole leaf list of so many bytes, and the seal that the node has of it."""
        hashes, text = await self._leaf_list(node, blob, 0, size_bytes)
        return hashes, seal_from_text(text)

    async def _leaf_list(self, node: str, blob: str, start: int, size_bytes: int) -> tuple[bytes, str]:
        received, seal = bytearray(), ""
        while len(received) < size_bytes:
            offset = start + len(received)
            page = BytesSink(offset, min(PAGE_BYTES, size_bytes - len(received)))
            byte_range = {"Range": f"bytes={offset}-{offset + len(page.content) - 1}"}
            path = f"/v1/leaves/{check_blob(blob)}"
            reply = await self._request(node, "GET", path, byte_range, page, len(page.content))
            seal = reply.headers.get(SEAL_HEADER.lower(), seal)
            received += page.content
        return bytes(received), seal

    async def _request(
        self,
        node: str,
        method: str,
        path: str,
        headers: dict[str, str],
        sink: BodySink,
        most_bytes: int,
        body: bytes = b"",
    ) -> PeerReply:
        links = {link.address: link for link in self._addresses().get(node, [])}
        error: ShoalError = Unavailable(f"node {node} publishes no address that may be used; see `shoal status`")
        blob, rates = path.split("/")[3], self._rates
        for address in rates.sort_by_rate(node, list(links), time.monotonic(), most_bytes):
            signed = {**self._tokens.token(node, blob, cluster_clock.now_s()), **headers}
            began_s = time.monotonic()
            try:
                reply = await self._client.request(node, links[address], method, path, signed, sink, body)
            except PeerBusy:
                raise
            except Unavailable as e:
                rates.record_failure(node, address, time.monotonic())
                if self._lost is not None:
                    await self._lost(node, e.message)
                if sink.has_begun:
                    raise
                error = e
                continue
            now_s = time.monotonic()
            rates.record(node, address, reply.body_bytes, now_s - began_s, now_s)
            return reply
        raise error
