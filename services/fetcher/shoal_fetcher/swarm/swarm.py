"""Fetches one blob from many nodes at once: sends the scheduler's requests, verifies each leaf, knows its sender."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import msgspec

from shoal_common.concurrency.notifier import Notifier
from shoal_common.errors import Corrupt, NotFound, ShoalError, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import HaveMessage
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.store.leaf_set import leaf_range, leaf_ranges
from shoal_fetcher.hub.range_reader import was_timeout
from shoal_fetcher.swarm.context import BlobFetchContext
from shoal_fetcher.swarm.have_gossip import PEER_SILENCE_TIMEOUT_S, HaveGossip
from shoal_fetcher.swarm.http_client import PeerBusy
from shoal_fetcher.swarm.leaf_list_sync import LeafListSync
from shoal_fetcher.swarm.origin import Origin
from shoal_fetcher.swarm.overlay import neighbours
from shoal_fetcher.swarm.scheduler import (
    ALL_LEAVES,
    LeafRequest,
    OutstandingRequest,
    PeerState,
    SwarmState,
    next_requests,
    next_wakeup_s,
    running_average,
)

log = StructuredLogger("swarm")

_RUN_DEADLINE_S = 120.0
_WAITING_AFTER_S = 1.0
"""After this long without a leaf, the download publishes what it waits for."""
_NOT_FOUND_BACKOFF_S = 0.5
"""A node that lacked what it had published is asked again after this long, or when it publishes again."""


class _Peer(msgspec.Struct):
    """What is known of a node from earlier runs."""

    rate_bytes_per_s: float = 0.0
    run_s: float = 0.0
    not_before_s: float = 0.0
    declined_at_s: float = float("-inf")


class _Run(msgspec.Struct):
    """A request that was sent."""

    leaf_request: LeafRequest
    asked_at_s: float
    left: int
    """Its leaves that have not arrived; none while a source has not chosen."""
    received_count: int = 0
    task: asyncio.Task[None] | None = None


class Swarm:
    """One attempt to fetch a blob. `run` it; closing `cleanup` releases the origin lease and ends the gossip."""

    def __init__(self, fetch: BlobFetchContext, cleanup: AsyncExitStack) -> None:
        self._fetch, self._cleanup = fetch, cleanup
        self._partial, self._node_context, self._health = fetch.partial, fetch.node_context, fetch.health
        self._draw = random.Random()
        self._loop = asyncio.get_running_loop()
        self._changed = Notifier()
        self._reachable_leaves: tuple[tuple[int, ...], dict[str, int]] | None = None
        self._known: dict[str, _Peer] = {}
        self._runs: list[_Run] = []
        self._leaves: set[asyncio.Task[None]] = set()
        self._failed: Exception | None = None
        self._moved_at_s = self._loop.time()
        self._durable_bytes = -1
        fetch.notify = fetch.partial.on_change = self.notify
        self._gossip = HaveGossip(fetch, self._on_have)
        self._lists = LeafListSync(fetch, self._gossip)
        self._origin = Origin(fetch, self._gossip, self._lists, self._available_elsewhere)

    def notify(self) -> None:
        """Wake the main loop after a change."""
        self._reachable_leaves = None
        self._changed.notify()

    async def run(self) -> tuple[str, LeafListSeal | None]:
        """Fetch all that is wanted. Returns the digest of the sealed leaf list, and its seal; "" if only some leaves
        were wanted.

        Raises BlobHashMismatch if it is not the blob; DiskFull, ReservationLost; what keeps the hub from sending it;
        or Unavailable after too long without progress.
        """
        await self._cleanup.enter_async_context(self._gossip)
        await self._cleanup.enter_async_context(self._origin.lease_stack)
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                self._raise_failures()
                if not self._fetch.missing():
                    if self._fetch.wanted != self._partial.all_leaves:
                        return "", None
                    if self._lists.sealed_digest:
                        return self._lists.sealed_digest, self._lists.seal
                now_s = self._loop.time()
                self._lists.refresh(self._reachable(), now_s)
                self._origin.start_if_needed(now_s)
                seen = self._changed.count
                wait_s = self._send_requests(now_s)
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait_after(seen)
        finally:
            watching.cancel()
            for request in self._runs:
                if request.task is not None:
                    request.task.cancel()
            tasks = {r.task for r in self._runs if r.task is not None} | self._leaves | {watching}
            await asyncio.wait(tasks)
            await self._lists.close()
            await self._origin.close()
            self._publish_durable()

    async def _watch(self) -> None:
        """Wake when the cluster view changes."""
        cluster_view = self._node_context.cluster_view
        while True:
            version = cluster_view.version()
            await cluster_view.wait_changed(version, PEER_SILENCE_TIMEOUT_S)
            self.notify()

    def _on_have(self, have: HaveMessage) -> None:
        peer = self._known.get(have.node)
        if peer is not None and not have.leaving:
            peer.not_before_s = min(peer.not_before_s, self._loop.time() + _NOT_FOUND_BACKOFF_S)
        self._lists.on_have(have)
        self._origin.notify()

    def _raise_failures(self) -> None:
        self._partial.raise_failure()
        for failed in (self._failed, self._origin.failed, self._lists.failed):
            if failed is not None:
                raise failed
        self._publish_durable()
        progress, cluster_view, fetch = self._fetch.progress, self._node_context.cluster_view, self._fetch
        origin = cluster_view.origin_of(fetch.blob)
        if origin not in (None, self._node_context.node):
            # A stuck origin loses its lease after its own deadline: ours does not run meanwhile.
            progress.mark_progress()
        if self._origin.is_rate_limited(self._loop.time()):
            progress.mark_progress()
        progress.check_stalled(fetch.file.path, self._health.last_error)
        if self._loop.time() - self._moved_at_s > _WAITING_AFTER_S and origin not in (None, self._node_context.node):
            progress.set_waiting_for(f"origin {origin}")

    def _publish_durable(self) -> None:
        durable_bytes = self._partial.durable_bytes
        if durable_bytes != self._durable_bytes:
            self._durable_bytes = durable_bytes
            self._fetch.progress.set_durable_bytes(self._fetch.blob, durable_bytes)

    def _reachable(self) -> dict[str, int]:
        """Return the nodes that can be asked, and their leaves. Recomputed after each `notify` and each update."""
        version = self._node_context.cluster_view.version()
        if self._reachable_leaves is None or version != self._reachable_leaves[0]:
            self._reachable_leaves = version, self._refresh_peers()
        return self._reachable_leaves[1]

    def _refresh_peers(self) -> dict[str, int]:
        fetch = self._fetch
        live = self._node_context.cluster_view.addresses()
        neighbour_nodes = neighbours(self._node_context.node, self._gossip.by_node, fetch.blob)
        leaves_by_node = {
            n: self._gossip.by_node[n].leaves for n in neighbour_nodes if n in live and self._health.may_ask(n)
        }
        if self._lists.agreed_digest():
            leaves_by_node |= {h.node: self._partial.all_leaves for h in fetch.holders() if h.node in live}
        return leaves_by_node

    def _available_elsewhere(self) -> int:
        """Return the leaves that some live node has, which need not come from the hub (I9)."""
        leaves = 0
        for node, has in self._reachable().items():
            if node in self._gossip.by_node or self._lists.sealed_digest:
                leaves |= has
        if self._fetch.holders_restarting():
            return self._partial.all_leaves
        for node in self._node_context.cluster_view.nodes_starting() & self._gossip.by_node.keys():
            leaves |= self._gossip.by_node[node].leaves if self._health.may_ask(node) else 0
        return leaves

    def _swarm_state(self, now_s: float) -> SwarmState:
        fetch = self._fetch
        origin = self._node_context.cluster_view.origin_of(fetch.blob)
        peers = []
        for node, leaves in self._reachable().items():
            peer = self._known.setdefault(node, _Peer())
            peer_have = self._gossip.by_node.get(node)
            if peer.not_before_s > now_s:
                continue
            if node in self._health.corrupt_leaf_counts and any(r.leaf_request.node == node for r in self._runs):
                continue  # a node that has sent a corrupt leaf is asked for one run at a time
            peers.append(
                PeerState(
                    node=node,
                    leaves=leaves,
                    source=leaves == self._partial.all_leaves
                    or (node == origin and peer_have is not None and peer_have.origin),
                    fetching=peer_have is not None and now_s - peer_have.at_s < PEER_SILENCE_TIMEOUT_S,
                    wanted=peer_have.wanted if peer_have else ALL_LEAVES,
                    rate_bytes_per_s=peer.rate_bytes_per_s,
                    run_s=peer.run_s,
                    growth_bytes_per_s=peer_have.growth_bytes_per_s if peer_have else 0.0,
                    declined_at_s=peer.declined_at_s,
                )
            )
        runs = [
            OutstandingRequest(
                node=r.leaf_request.node,
                leaves=r.left & ~self._partial.written,
                any=r.leaf_request.any,
                possible_leaves=r.leaf_request.leaves if r.leaf_request.any else 0,
                asked_at_s=r.asked_at_s,
            )
            for r in self._runs
        ]
        return SwarmState(
            leaf_count=self._partial.leaf_count,
            have=self._partial.written,
            wanted=fetch.wanted,
            known=self._partial.with_known_hash,
            peers=peers,
            runs=runs,
            now_s=now_s,
            last_leaf_at_s=self._moved_at_s,
        )

    # Requests

    def _send_requests(self, now_s: float) -> float:
        """Send the requests that are due. Returns the seconds until the next decision."""
        for request in self._runs:
            if (
                request.left
                and not request.left & ~self._partial.written
                and request.task is not None
                and request.received_count == 0
            ):
                request.task.cancel()  # others were faster
        state = self._swarm_state(now_s)
        for leaf_request in next_requests(state, self._draw):
            # The origin gossips a leaf's hash first: a leaf that cannot be verified is not requested.
            leaves = leaf_request.leaves & self._partial.with_known_hash
            if not leaf_request.any and leaves:
                leaves = leaf_range(*next(leaf_ranges(leaves)))
            if not leaves:
                continue
            request = _Run(
                msgspec.structs.replace(leaf_request, leaves=leaves), now_s, left=0 if leaf_request.any else leaves
            )
            request.task = asyncio.create_task(self._request(request))
            self._runs.append(request)
            request.task.add_done_callback(lambda task, request=request: self._request_ended(request, task))  # type: ignore[misc]  # a default binds it
        blocked = [p.not_before_s - now_s for p in self._known.values() if p.not_before_s > now_s]
        return max(min([next_wakeup_s(state), *blocked]), 0.01)

    def _request_ended(self, request: _Run, task: asyncio.Task[None]) -> None:
        self._runs.remove(request)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)
        self.notify()

    async def _request(self, request: _Run) -> None:
        leaf_request, fetch, node = request.leaf_request, self._fetch, request.leaf_request.node
        peer = self._known[node]
        pending: set[asyncio.Task[None]] = set()
        received_bytes = 0

        def took(leaf: int, data: memoryview, done: Callable[[], None]) -> None:
            nonlocal received_bytes
            received_bytes += len(data)
            request.received_count += 1
            task = asyncio.create_task(self._accept_leaf(request, leaf, data, done))
            pending.add(task)
            self._leaves.add(task)
            task.add_done_callback(self._leaves.discard)

        def chosen(first: int, end: int) -> None:
            request.left = leaf_range(first, end)
            self.notify()

        peers, size_bytes = self._node_context.peers, fetch.file.size_bytes
        try:
            async with asyncio.timeout(_RUN_DEADLINE_S):
                if leaf_request.any:
                    reply = await peers.any_leaves(
                        node, fetch.blob, size_bytes, leaf_request.leaves, leaf_request.max_leaves, took, chosen
                    )
                else:
                    first, end = next(leaf_ranges(leaf_request.leaves))
                    reply = await peers.leaves(node, fetch.blob, size_bytes, first, end, took)
            if reply.status == 204:
                peer.declined_at_s = self._loop.time()
                return
            took_s = max(self._loop.time() - request.asked_at_s, 1e-6)
            peer.rate_bytes_per_s = running_average(peer.rate_bytes_per_s, received_bytes / took_s)
            peer.run_s = running_average(peer.run_s, took_s)
            if pending:
                await asyncio.wait(pending)
        except PeerBusy as e:
            peer.not_before_s = self._loop.time() + e.retry_after_s
        except Corrupt as e:
            self._record_corruption(node, e.message)
        except NotFound as e:
            if (peer_have := self._gossip.by_node.get(node)) is not None:
                peer_have.leaves = 0  # until it publishes again
            self._record_failure(node, peer, e)
            peer.not_before_s = max(peer.not_before_s, self._loop.time() + _NOT_FOUND_BACKOFF_S)
        except TimeoutError:
            self._record_failure(
                node, peer, Unavailable(f"node {node} took more than {_RUN_DEADLINE_S:.0f} s for a run")
            )
        except ShoalError as e:
            self._record_failure(node, peer, e)

    def _record_failure(self, node: str, peer: _Peer, error: ShoalError) -> None:
        delay_s = self._health.record_failure(error, node)
        self._fetch.progress.record_source_failure(self._fetch.file.path, node)
        if was_timeout(error):
            self._fetch.progress.record_switch(node)
        peer.not_before_s = self._loop.time() + delay_s
        self.notify()
        log.warning("source failed", path=self._fetch.file.path, source=node, reason=error.message, wait_s=delay_s)
        self._fetch.progress.set_waiting_for(error.message)

    async def _accept_leaf(self, request: _Run, leaf: int, data: memoryview, done: Callable[[], None]) -> None:
        """Verify and write a complete leaf. Its sender is known."""
        node, bit = request.leaf_request.node, 1 << leaf
        try:
            self._fetch.progress.record_received(node, len(data), self._fetch.file.path)
            if not self._partial.written & bit and self._health.may_ask(node):
                if await self._partial.write(leaf, data):
                    self._moved_at_s = self._loop.time()
                    self._health.failure_counts.pop(node, None)
                    self._fetch.progress.set_waiting_for("")
                    self._gossip.publish_soon()
                    self._origin.notify()
                elif self._health.may_ask(node):
                    self._record_corruption(
                        node, f"node {node} sent a corrupt leaf {leaf} of {self._fetch.file.path}"
                    )
            await self._fetch.progress.take_from_limiter(self._node_context.rate_limits.for_peer(node), len(data))
        except (ShoalError, OSError) as e:
            self._fail(e)
        finally:
            request.left &= ~bit
            done()
            if not self._fetch.missing():
                self.notify()

    def _record_corruption(self, node: str, reason: str) -> None:
        """Record that a node sent corrupt bytes, and ban it if it is not the first time."""
        self.notify()
        log.warning("corrupt bytes from a node", peer=node, reason=reason)
        self._health.last_error = Corrupt(reason)
        self._fetch.progress.set_waiting_for(reason)
        if self._health.record_corrupt_leaf(node):
            log.warning("node banned for this blob", peer=node, blob=self._fetch.blob)
            self._fetch.progress.record_source_failure(self._fetch.file.path, node)
            self._fetch.progress.set_waiting_for(f"{reason}; it is not asked again")
            for request in self._runs:
                if (
                    request.leaf_request.node == node
                    and request.task is not None
                    and request.task is not asyncio.current_task()
                ):
                    request.task.cancel()

    def _fail(self, error: Exception) -> None:
        self._failed = self._failed or error
        self.notify()
