"""Asking the fileserver of a node: which of its addresses, with which credential, at which pace."""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal_common.credentials import blob_token
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.layout import LEAF_BYTES
from shoal_common.names import check_blob
from shoal_common.pace import Pace
from shoal_common.runs import run, to_bitmap
from shoal_fetcher.swarm.receive import Crowded, Landing, Leaves, PeerClient, Reply, Took, Whole

PAGE_BYTES = 256 << 10
"""Of a leaf list, read at once: the list of 8 GiB."""
_MAX_REMEMBERED = 1024


class Peers:
    """The other nodes' fileservers. `addresses()` says which live ones there are, and where."""

    def __init__(self, client: PeerClient, secret: str, addresses: Callable[[], dict[str, list[str]]]) -> None:
        self._client, self._secret, self._addresses = client, secret, addresses
        self._good: dict[str, str] = {}
        self._paces: dict[str, Pace] = {}
        self._rate: int | None = None

    @property
    def client(self) -> PeerClient:
        """What asks."""
        return self._client

    def pace_of(self, node: str) -> Pace:
        """What limits the bytes that we take from a node."""
        if node not in self._paces:
            if len(self._paces) >= _MAX_REMEMBERED:
                self._paces.clear()
            self._paces[node] = Pace(self._rate)
        return self._paces[node]

    def use_rate(self, bytes_per_s: int | None) -> None:
        """From now on so much is taken from each node at most; None: no limit."""
        self._rate = bytes_per_s
        for pace in self._paces.values():
            pace.use(bytes_per_s)

    async def leaves(self, node: str, blob: str, size_bytes: int, first: int, end: int, took: Took) -> Reply:
        """Leaves [first, end) of a blob."""

        def exactly(got_first: int, got_end: int) -> bool:
            return (got_first, got_end) == (first, end)

        span = f"bytes={first * LEAF_BYTES}-{min(end * LEAF_BYTES, size_bytes) - 1}"
        landing = Leaves(size_bytes, exactly, took, self._client.buffers)
        return await self._leaves(node, "GET", f"/v1/blobs/{check_blob(blob)}", {"Range": span}, landing)

    async def any(
        self,
        node: str,
        blob: str,
        size_bytes: int,
        leaves: int,
        max_leaves: int,
        took: Took,
        chosen: Callable[[int, int], None],
    ) -> Reply:
        """A run of a source's choice among these leaves; `chosen(first, end)` is called once it has said which."""

        def fits(first: int, end: int) -> bool:
            if end - first > max_leaves or run(first, end) & ~leaves:
                return False
            chosen(first, end)
            return True

        landing = Leaves(size_bytes, fits, took, self._client.buffers)
        path = f"/v1/blobs/{check_blob(blob)}/any?max_leaves={max_leaves}"
        body = to_bitmap(leaves, -(-size_bytes // LEAF_BYTES))
        return await self._leaves(node, "POST", path, {}, landing, body)

    async def _leaves(
        self, node: str, method: str, path: str, headers: dict[str, str], landing: Leaves, body: bytes = b""
    ) -> Reply:
        try:
            return await self._ask(node, method, path, headers, landing, body)
        finally:
            landing.close()

    async def leaf_list(self, node: str, blob: str, start: int, size_bytes: int) -> bytes:
        """Bytes [start, start + size_bytes) of a leaf list, in pages."""
        found = bytearray()
        while len(found) < size_bytes:
            at = start + len(found)
            page = Whole(at, min(PAGE_BYTES, size_bytes - len(found)))
            span = {"Range": f"bytes={at}-{at + len(page.content) - 1}"}
            await self._ask(node, "GET", f"/v1/leaves/{check_blob(blob)}", span, page)
            found += page.content
        return bytes(found)

    async def _ask(
        self, node: str, method: str, path: str, headers: dict[str, str], landing: Landing, body: bytes = b""
    ) -> Reply:
        addresses = list(self._addresses().get(node, []))
        if (good := self._good.get(node)) in addresses:
            addresses.remove(good)
            addresses.insert(0, good)
        error: ShoalError = Unavailable(f"node {node} says no address")
        blob = path.split("/")[3]
        for address in addresses:
            token = blob_token(self._secret, node, blob, time.time())
            try:
                reply = await self._client.ask(node, address, method, path, {**token, **headers}, landing, body)
            except Unavailable as e:
                error = e
                if isinstance(e, Crowded) or landing.begun:
                    raise
                continue
            if len(self._good) >= _MAX_REMEMBERED:
                self._good.clear()
            self._good[node] = address
            return reply
        raise error
