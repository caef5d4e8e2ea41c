"""The leaf list of a blob being fetched: sealed if some node has its digest, else provisional, from the origin."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine

from shoal_common.errors import ShoalError
from shoal_common.logs import Log
from shoal_common.messages.swarm import Have
from shoal_common.store.leaf_hash import HASH_BYTES, list_bytes, root_of
from shoal_common.store.leaf_set import bounds, run
from shoal_fetcher.sources.source_selection import sealed_root
from shoal_fetcher.swarm.context import Fetch
from shoal_fetcher.swarm.have_gossip import Haves

log = Log("lists")

_RETRY_S = 0.3
_FORGET_S = 5.0
"""A node that did not send its list is asked again after this long."""
_MAX_PROVISIONAL_LEAVES = 1 << 16
"""Of a provisional list, per request."""


class Lists:
    """What is known of the list, and who vouched for it."""

    def __init__(self, fetch: Fetch, haves: Haves) -> None:
        self._fetch, self._haves = fetch, haves
        self.proven = ""
        """The digest, once it is sealed and the partial blob has this list."""
        self.lacking = False
        """A digest is sealed, and no node that can be asked has its list."""
        self._nodes_without_list: set[str] = set()
        self._forget_at_s = 0.0
        self._leaves_vouched_by: dict[str, int] = {}
        self._retry_at_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._draw = random.Random()
        self.failed: Exception | None = None

    def root(self) -> str:
        """Return the sealed digest; "" if none is published, or they disagree."""
        around = self._fetch.shared.around
        digests = {self._fetch.file.leaves, self._haves.sealed, *around.roots(self._fetch.blob)}
        setbacks = self._fetch.setbacks
        return sealed_root(digests | {h.sealed for h in self._haves.heard.values() if h.node not in setbacks.corrupt})

    def heard(self, have: Have) -> None:
        """Learn the hashes in an origin's message."""
        fetch = self._fetch
        holder = fetch.shared.around.origin(fetch.blob)
        if (
            not have.hashes
            or not have.origin
            or self._haves.origin
            or holder not in (have.node, None)
            or not fetch.setbacks.may_ask(have.node)
        ):
            return
        leaves = run(have.hashes_from, have.hashes_from + len(have.hashes) // HASH_BYTES)
        if leaves & ~fetch.partial.known and self._task is None:
            self._start(self._learn(have.node, have.hashes_from, have.hashes))
        # Hashes that are ignored now, while a list is being read, are requested later as missing.

    def look(self, reachable: dict[str, int], now_s: float) -> None:
        """Fetch what is missing. `reachable`: nodes that can be asked, and their leaves."""
        fetch, partial = self._fetch, self._fetch.partial
        if self.proven or self._task is not None:
            return
        if root := self.root():
            if partial.known == partial.all and root_of(partial.hashes) == root:
                self._use_sealed(root)
            elif now_s >= self._retry_at_s:
                holders = [h.node for h in fetch.holders()]
                sealers = [h.node for h in self._haves.heard.values() if h.sealed == root and h.node in reachable]
                nodes = sorted({*holders, *sealers} & reachable.keys())
                if now_s >= self._forget_at_s:
                    self._forget_at_s = now_s + _FORGET_S
                    self._nodes_without_list.clear()
                nodes = [n for n in nodes if n not in self._nodes_without_list]
                self.lacking = not nodes
                if nodes:
                    self._start(self._read_sealed(root, nodes))
        elif not self._haves.origin and not fetch.setbacks.alone and now_s >= self._retry_at_s:
            lacking = {n: leaves & ~partial.known for n, leaves in reachable.items()}
            nodes = [n for n, leaves in lacking.items() if leaves and n in self._haves.heard]
            if nodes:
                origin = fetch.shared.around.origin(fetch.blob)
                node = origin if origin in nodes else self._draw.choice(nodes)
                self._start(self._read_provisional(node, lacking[node]))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.create_task(work)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            self.failed = error if isinstance(error, Exception) else None
        self._fetch.changed()

    def seal(self, root: str) -> None:
        """Seal the list: this node has hashed all leaves to the blob's name, and the list has this digest."""
        self._use_sealed(root)

    def _use_sealed(self, root: str) -> None:
        self.proven = self._haves.sealed = root
        self._haves.say_soon()
        self._fetch.changed()

    async def _learn(self, node: str, first: int, hashes: bytes) -> None:
        learned = await self._fetch.partial.learn(first, hashes)
        if learned:
            self._leaves_vouched_by[node] = self._leaves_vouched_by.get(node, 0) | learned
            self._fetch.setbacks.givers.add(node)

    async def _read_sealed(self, root: str, nodes: list[str]) -> None:
        fetch = self._fetch
        self._retry_at_s = asyncio.get_running_loop().time() + _RETRY_S
        self._draw.shuffle(nodes)
        for node in nodes:
            try:
                hashes = await fetch.shared.peers.leaf_list(node, fetch.blob, 0, list_bytes(fetch.file.size_bytes))
            except ShoalError as e:
                log.info("a node did not send its leaf list", peer=node, blob=fetch.blob, reason=e.message)
                self._nodes_without_list.add(node)
                continue
            if root_of(hashes) != root:
                log.warning("node banned, its leaf list has the wrong digest", peer=node, blob=fetch.blob)
                fetch.setbacks.corrupt.add(node)
                continue
            differing = await fetch.partial.use_list(hashes)
            for voucher, leaves in self._leaves_vouched_by.items():
                if leaves & differing:
                    log.warning("node banned, it sent wrong leaf hashes", peer=voucher, blob=fetch.blob)
                    fetch.setbacks.corrupt.add(voucher)
            return self._use_sealed(root)

    async def _read_provisional(self, node: str, leaves: int) -> None:
        fetch = self._fetch
        self._retry_at_s = asyncio.get_running_loop().time() + _RETRY_S
        first, end = bounds(leaves)
        end = min(end, first + _MAX_PROVISIONAL_LEAVES)
        try:
            size_bytes = (end - first) * HASH_BYTES
            hashes = await fetch.shared.peers.leaf_list(node, fetch.blob, first * HASH_BYTES, size_bytes)
        except ShoalError as e:
            return log.info("a node did not send its leaf list", peer=node, blob=fetch.blob, reason=e.message)
        await self._learn(node, first, hashes)

    async def close(self) -> None:
        """Stop the running request."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
