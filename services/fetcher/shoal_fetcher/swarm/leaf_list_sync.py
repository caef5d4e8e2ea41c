"""The leaf list of a blob being fetched: sealed if some node has its digest, else provisional, from the origin."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine

from shoal_common.errors import ShoalError
from shoal_common.identity.seals import SealedList
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import HaveMessage
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.store.leaf_hash import HASH_BYTES, hash_leaf_list, leaf_list_size
from shoal_common.store.leaf_set import enclosing_range, leaf_range
from shoal_fetcher.sources.source_selection import agreed_digest
from shoal_fetcher.swarm.context import BlobFetchContext
from shoal_fetcher.swarm.have_gossip import HaveGossip

log = StructuredLogger("lists")

_RETRY_S = 0.3
_FORGET_S = 5.0
"""A node that did not send its list is asked again after this long."""
_MAX_PROVISIONAL_LEAVES = 1 << 16
"""Of a provisional list, per request."""


class LeafListSync:
    """What is known of the leaf list, and from which nodes."""

    def __init__(self, fetch: BlobFetchContext, gossip: HaveGossip) -> None:
        self._fetch, self._gossip = fetch, gossip
        self.sealed_digest = ""
        """The digest, once it is sealed and the partial blob has this list."""
        self.seal: LeafListSeal | None = None
        """Who says so. Storage decides whether that counts, or hashes the blob by sha256."""
        self.has_taken_list = False
        """Whether a list from elsewhere has replaced what was known."""
        self.is_unavailable = False
        """A digest is sealed, and no node that can be asked has its list."""
        self._nodes_without_list: set[str] = set()
        self._forget_at_s = 0.0
        self._leaves_trusted_from: dict[str, int] = {}
        self._retry_at_s = 0.0
        self._task: asyncio.Task[None] | None = None
        self._draw = random.Random()
        self.failed: Exception | None = None

    def agreed_digest(self) -> str:
        """Return the sealed digest; "" if none is published, or they disagree."""
        cluster_view = self._fetch.node_context.cluster_view
        digests = {
            self._fetch.file.leaf_list_digest,
            self._gossip.sealed,
            *cluster_view.leaf_list_digests(self._fetch.blob),
        }
        health = self._fetch.health
        return agreed_digest(
            digests | {h.sealed for h in self._gossip.by_node.values() if h.node not in health.banned}
        )

    def on_have(self, have: HaveMessage) -> None:
        """Learn the hashes in an origin's message."""
        fetch = self._fetch
        holder = fetch.node_context.cluster_view.origin_of(fetch.blob)
        if (
            not have.hashes
            or not have.origin
            or self._gossip.origin
            or holder not in (have.node, None)
            or not fetch.health.may_ask(have.node)
        ):
            return
        leaves = leaf_range(have.first_hash_leaf, have.first_hash_leaf + len(have.hashes) // HASH_BYTES)
        if leaves & ~fetch.partial.with_known_hash and self._task is None:
            self._start(self._learn(have.node, have.first_hash_leaf, have.hashes))
        # Hashes that are ignored now, while a list is being read, are requested later as missing.

    def refresh(self, reachable: dict[str, int], now_s: float) -> None:
        """Fetch what is missing. `reachable`: nodes that can be asked, and their leaves."""
        fetch, partial = self._fetch, self._fetch.partial
        if self.sealed_digest or self._task is not None:
            return
        if digest := self.agreed_digest():
            seal = self._gossiped_seal(digest)
            is_known = partial.with_known_hash == partial.all_leaves and hash_leaf_list(partial.leaf_list) == digest
            if is_known and (seal or not fetch.node_context.seals.signs):
                self._use_sealed(digest, seal)
            elif now_s >= self._retry_at_s:
                holders = [h.node for h in fetch.holders()]
                sealers = [
                    h.node for h in self._gossip.by_node.values() if h.sealed == digest and h.node in reachable
                ]
                nodes = sorted({*holders, *sealers} & reachable.keys())
                if now_s >= self._forget_at_s:
                    self._forget_at_s = now_s + _FORGET_S
                    self._nodes_without_list.clear()
                nodes = [n for n in nodes if n not in self._nodes_without_list]
                self.is_unavailable = not nodes
                if is_known and not nodes:
                    self._use_sealed(digest, None)
                elif nodes:
                    self._start(self._read_sealed(digest, nodes))
        elif not self._gossip.origin and not fetch.health.trusts_one_source and now_s >= self._retry_at_s:
            missing_hashes = {n: leaves & ~partial.with_known_hash for n, leaves in reachable.items()}
            nodes = [n for n, leaves in missing_hashes.items() if leaves and n in self._gossip.by_node]
            if nodes:
                origin = fetch.node_context.cluster_view.origin_of(fetch.blob)
                node = origin if origin in nodes else self._draw.choice(nodes)
                self._start(self._read_provisional(node, missing_hashes[node]))

    def _gossiped_seal(self, digest: str) -> LeafListSeal | None:
        may_ask = self._fetch.health.may_ask
        seals = (h.seal for h in self._gossip.by_node.values() if h.sealed == digest and may_ask(h.node))
        return next((seal for seal in seals if seal is not None), None)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.create_task(work)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            self.failed = error if isinstance(error, Exception) else None
        self._fetch.notify()

    def use_own(self, digest: str, seal: LeafListSeal | None) -> None:
        """Seal the list: this node has hashed all leaves to the blob's name, and the list has this digest."""
        self._use_sealed(digest, seal)

    def _use_sealed(self, digest: str, seal: LeafListSeal | None) -> None:
        self.sealed_digest = self._gossip.sealed = digest
        self.seal = self._gossip.seal = seal
        self._gossip.publish_soon()
        self._fetch.notify()

    async def _learn(self, node: str, first: int, hashes: bytes) -> None:
        learned = await self._fetch.partial.add_hashes(first, hashes)
        if learned:
            self._leaves_trusted_from[node] = self._leaves_trusted_from.get(node, 0) | learned
            self._fetch.health.trusted_sources.add(node)

    async def _read_sealed(self, digest: str, nodes: list[str]) -> None:
        fetch = self._fetch
        self._retry_at_s = asyncio.get_running_loop().time() + _RETRY_S
        self._draw.shuffle(nodes)
        for node in nodes:
            try:
                hashes, seal = await fetch.node_context.peers.sealed_leaf_list(
                    node, fetch.blob, leaf_list_size(fetch.file.size_bytes)
                )
            except ShoalError as e:
                log.info("a node did not send its leaf list", peer=node, blob=fetch.blob, reason=e.message)
                self._nodes_without_list.add(node)
                continue
            if hash_leaf_list(hashes) != digest:
                log.warning("node banned, its leaf list has the wrong digest", peer=node, blob=fetch.blob)
                fetch.health.banned.add(node)
                continue
            seal = seal or self._gossiped_seal(digest)
            sealed = SealedList(fetch.blob, fetch.file.size_bytes, digest)
            if await asyncio.to_thread(fetch.node_context.seals.refusal, seal, sealed):
                fetch.health.trusted_sources.add(node)  # only storage's sha256 can tell whether it lied
            self.has_taken_list = True
            differing = await fetch.partial.apply_sealed_list(hashes)
            for trusted_source, leaves in self._leaves_trusted_from.items():
                if leaves & differing:
                    log.warning("node banned, it sent wrong leaf hashes", peer=trusted_source, blob=fetch.blob)
                    fetch.health.banned.add(trusted_source)
            return self._use_sealed(digest, seal)

    async def _read_provisional(self, node: str, leaves: int) -> None:
        fetch = self._fetch
        self._retry_at_s = asyncio.get_running_loop().time() + _RETRY_S
        first, end = enclosing_range(leaves)
        end = min(end, first + _MAX_PROVISIONAL_LEAVES)
        try:
            size_bytes = (end - first) * HASH_BYTES
            hashes = await fetch.node_context.peers.leaf_list(node, fetch.blob, first * HASH_BYTES, size_bytes)
        except ShoalError as e:
            return log.info("a node did not send its leaf list", peer=node, blob=fetch.blob, reason=e.message)
        await self._learn(node, first, hashes)

    async def close(self) -> None:
        """Stop the running request."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
