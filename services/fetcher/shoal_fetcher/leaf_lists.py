"""Reading leaf lists from the fileservers of other nodes."""

from __future__ import annotations

import httpx2

from shoal_common.credentials import bearer
from shoal_common.errors import Corrupt, ShoalError, Unavailable
from shoal_fetcher.http_range import leaves_url, peer_source, read_range
from shoal_fetcher.surroundings import Surroundings


class PeerLists:
    """The leaf lists that other nodes give."""

    def __init__(self, secret: str, peers: httpx2.AsyncClient, around: Surroundings) -> None:
        self._credentials, self._peers, self._around = bearer(secret, "blobs"), peers, around

    async def leaf_list(self, node: str, blob: str, start: int, size_bytes: int) -> bytes:
        """Bytes of the list of a blob that a node gives: nothing is known of them. Raises Unavailable, NotFound, …"""
        error: ShoalError = Unavailable(f"node {node} says no address")
        for address in self._around.addresses().get(node, []):
            try:
                return await self._read(node, leaves_url(address, blob), start, size_bytes)
            except ShoalError as e:
                error = e
        raise error

    async def _read(self, node: str, url: str, start: int, size_bytes: int) -> bytes:
        hashes = bytearray()
        source = peer_source(node)
        async with read_range(self._peers, url, self._credentials, start, start + size_bytes, source) as body:
            async for chunk in body.chunks:
                hashes += chunk
                if len(hashes) > size_bytes:
                    raise Corrupt(f"node {node} sends a longer leaf list than was asked for")
        return bytes(hashes)
