"""The origin: the one node that reads a blob whose leaf hashes nobody knows, and gossips them to the others.

It reads from the hub, or from a node that has the complete blob without a leaf list (in a library, or an older
version). It reads in order what no live node has, and hashes everything, also what came from the others, in order by
sha256. If that is the blob's name, the list is sealed.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress

from shoal_common.concurrency.notifier import Notifier
from shoal_common.errors import Corrupt, Denied, InternalError, ShoalError, Unavailable
from shoal_common.identity.seals import SealedList
from shoal_common.logs import StructuredLogger
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import hash_leaf_list
from shoal_common.store.leaf_set import leaf_range, leaf_ranges
from shoal_fetcher.errors import BlobHashMismatch, RateLimited
from shoal_fetcher.hub.range_reader import Body, was_timeout
from shoal_fetcher.partials.blocking import run_in_default_executor
from shoal_fetcher.partials.leaf_splitter import LeafSplitter
from shoal_fetcher.partials.partial_blob import PartialBlob
from shoal_fetcher.sources.failure_policy import HUB, UNKNOWN_SOURCE, waiting_text
from shoal_fetcher.sources.source_selection import FetchFromPeer, choose_source
from shoal_fetcher.swarm.context import BlobFetchContext
from shoal_fetcher.swarm.have_gossip import HaveGossip
from shoal_fetcher.swarm.leaf_list_sync import LeafListSync
from shoal_fetcher.swarm.origin_lease import OriginLease, acquire_origin
from shoal_fetcher.swarm.peer_client import FileserverClient

log = StructuredLogger("origin")

HubReader = Callable[[int, int], AbstractAsyncContextManager[Body]]
"""Opens a source at bytes [start, end)."""
WaitRate = Callable[[int], Awaitable[None]]
"""Returns when so many bytes may pass."""
_HASH_BATCH_LEAVES = 16
_RUN_LEAVES = 16
_LEASE_RETRY_S = 0.5
_POLL_INTERVAL_S = 1.0
_SKIP_LEAVES = 64
"""When the others have this many of the leaves that are still to come, reading restarts behind them."""


class ConflictingLeafHashes(Corrupt):
    """The source contradicts a leaf hash that was trusted from a node."""


async def read_missing(
    partial: PartialBlob,
    name: str,
    source: str,
    read: HubReader,
    missing: Callable[[], int],
    on_leaf: Callable[[int], None],
    on_bytes: Callable[[int], Awaitable[None]],
    sealed: Callable[[], bool],
) -> None:
    """Read the leaves that `missing()` returns, in order, until it returns none.

    `on_bytes(count)` may wait; `on_leaf(leaf)` is called for each leaf. Raises Corrupt, ConflictingLeafHashes, and
    what `read` raises.
    """
    while remaining := missing():
        first, end = next(leaf_ranges(remaining))
        last = min(end * LEAF_BYTES, partial.size_bytes)
        splitter = LeafSplitter(partial.size_bytes)
        async with read(first * LEAF_BYTES, last) as body:
            splitter.seek(body.offset)
            async for chunk in body.chunks:
                await on_bytes(len(chunk))
                for leaf, data in splitter.feed(chunk):
                    if partial.written >> leaf & 1:
                        continue  # sent again by a source that ignores ranges
                    if await partial.write(leaf, data, trust_hash=True):
                        on_leaf(leaf)
                    elif sealed():
                        raise Corrupt(f"{source} sent corrupt bytes of {name}")
                    else:
                        raise ConflictingLeafHashes(f"{source} sent other bytes of {name} than a node's hashes")
                if splitter.has_excess:
                    raise Corrupt(f"{source} sent more bytes of {name} than it has")
                if (leaf_range(splitter.leaf, end) & ~missing()).bit_count() >= _SKIP_LEAVES:
                    break
            else:
                if splitter.leaf < end and leaf_range(splitter.leaf, end) & missing():
                    raise Unavailable(f"{source} ended early: leaves of {name} are missing")


def hub_reader(read: HubReader, wait_rate: WaitRate) -> HubReader:
    """Return a reader of the hub, under the hub's rate limit."""

    @asynccontextmanager
    async def reading(start: int, end: int) -> AsyncIterator[Body]:
        async with read(start, end) as body:

            async def chunks() -> AsyncIterator[bytes]:
                async for chunk in body.chunks:
                    await wait_rate(len(chunk))
                    yield chunk

            yield Body(body.offset, chunks())

    return reading


def node_reader(peers: FileserverClient, node: str, blob: str, size_bytes: int, wait_rate: WaitRate) -> HubReader:
    """Return a reader of a node that has the complete blob and no leaf list. Only that node is trusted."""

    @asynccontextmanager
    async def reading(start: int, end: int) -> AsyncIterator[Body]:
        async def chunks() -> AsyncIterator[bytes]:
            first, last = start // LEAF_BYTES, -(-end // LEAF_BYTES)
            while first < last:
                run_end = min(first + _RUN_LEAVES, last)
                received: asyncio.Queue[bytes] = asyncio.Queue()

                def on_leaf(
                    leaf: int, data: memoryview, done: Callable[[], None], queue: asyncio.Queue[bytes] = received
                ) -> None:
                    queue.put_nowait(bytes(data))
                    done()

                fetching = asyncio.ensure_future(peers.leaves(node, blob, size_bytes, first, run_end, on_leaf))
                try:
                    for _ in range(first, run_end):
                        getting = asyncio.ensure_future(received.get())
                        try:
                            await asyncio.wait({fetching, getting}, return_when=asyncio.FIRST_COMPLETED)
                            if fetching.done():
                                fetching.result()  # raises if it ended early
                            data = await getting
                        finally:
                            getting.cancel()
                        await wait_rate(len(data))
                        yield data
                    await fetching
                finally:
                    fetching.cancel()
                    await asyncio.wait({fetching})
                first = run_end

        yield Body(start, chunks())

    return reading


async def sha256_of(partial: PartialBlob, more: Callable[[], Awaitable[None]]) -> str:
    """Return the sha256 of all leaves, hashed in order as they become ready; `more` waits for new ones."""
    digest, next_leaf = hashlib.sha256(), 0

    def update(first: int, end: int) -> None:
        for leaf in range(first, end):
            digest.update(partial.read(leaf))

    while next_leaf < partial.leaf_count:
        ready = partial.relayable >> next_leaf
        count = min((~ready & (ready + 1)).bit_length() - 1, _HASH_BATCH_LEAVES)
        if count == 0:
            await more()
            continue
        await run_in_default_executor(update, next_leaf, next_leaf + count)
        next_leaf += count
    return digest.hexdigest()


class Origin:
    """The origin role: `start_if_needed` takes it, and the lease lasts while `lease_stack` is open."""

    def __init__(
        self, fetch: BlobFetchContext, gossip: HaveGossip, lists: LeafListSync, elsewhere: Callable[[], int]
    ) -> None:
        self._fetch, self._gossip, self._lists, self._elsewhere = fetch, gossip, lists, elsewhere
        self.lease_stack = AsyncExitStack()
        self.failed: ShoalError | None = None
        """The error that ends the attempt."""
        self._task: asyncio.Task[None] | None = None
        self._retry_at_s = self._rate_limited_until_s = 0.0
        self._leaves_changed = Notifier()

    def is_rate_limited(self, now_s: float) -> bool:
        """Return whether it waits because the hub asked it to."""
        return now_s <= self._rate_limited_until_s

    def notify(self) -> None:
        """Wake the reader: leaves have become ready, or another node has new ones."""
        self._leaves_changed.notify()

    async def _wait_leaves(self) -> None:
        await self._leaves_changed.wait_after(self._leaves_changed.count)

    def start_if_needed(self, now_s: float) -> None:
        """Become the origin if one is needed and there is none."""
        fetch = self._fetch
        if self._task is not None or now_s < self._retry_at_s or not self._is_needed():
            return
        is_free = fetch.node_context.cluster_view.origin_of(fetch.blob) in (None, fetch.node_context.node)
        if is_free and not self._is_denied():
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(self._ended)

    def _is_needed(self) -> bool:
        fetch = self._fetch
        if fetch.holders_restarting():
            return False
        if self._lists.sealed_digest:
            return bool(fetch.missing() & ~self._elsewhere())
        if fetch.holders() and self._lists.agreed_digest() and not self._lists.is_unavailable:
            return False  # the holders have the list
        return bool(fetch.missing()) or fetch.wanted == fetch.partial.all_leaves

    def _is_denied(self) -> bool:
        """Return whether the hub refuses us what we would read there, and not to another node."""
        fetch = self._fetch
        if fetch.holders() or not fetch.missing() & ~self._elsewhere():
            return False
        try:
            return fetch.node_context.is_denied(fetch.manifest, fetch.progress)
        except Denied as e:
            self.failed = e
            fetch.notify()
            return True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed = (
                error if isinstance(error, ShoalError) else InternalError(f"reading as the origin failed: {error!r}")
            )
        self._fetch.notify()

    async def _run(self) -> None:
        fetch, node_context = self._fetch, self._fetch.node_context
        source: str | None = None
        keep_lease = False
        try:
            holding = await acquire_origin(node_context, fetch.blob)
            if holding is None:
                self._retry_at_s = asyncio.get_running_loop().time() + _LEASE_RETRY_S
                return
            lease = await self.lease_stack.enter_async_context(holding)
            # The last origin may have finished between our check and our lease (I9).
            await node_context.cluster_view.wait_caught_up()
            if not self._is_needed():
                return
            choice = choose_source(
                fetch.blob, fetch.holders(), None, node_context.node, fetch.health, node_context.read_counts
            )
            source = choice.node if isinstance(choice, FetchFromPeer) else None
            self._gossip.origin = True
            await self._while_held(lease, source)
            keep_lease = True
        except asyncio.CancelledError:
            # The blob is complete, or the attempt ends: `lease_stack` releases the lease, after the commit.
            keep_lease = True
            raise
        except BlobHashMismatch:
            raise
        except ConflictingLeafHashes as e:
            raise BlobHashMismatch(e.message) from e
        except ShoalError as e:
            # Raises if a retry cannot help.
            delay_s = fetch.health.record_failure(
                e, source, has_peer=fetch.has_other_source() or bool(self._elsewhere())
            )
            log.warning("source failed", path=fetch.file.path, source=source or HUB, reason=e.message, wait_s=delay_s)
            fetch.progress.record_source_failure(fetch.file.path, source or HUB)
            if was_timeout(e):
                fetch.progress.record_switch(source or HUB)
            fetch.progress.set_waiting_for(waiting_text(e))
            self._retry_at_s = asyncio.get_running_loop().time() + delay_s
            if isinstance(e, RateLimited):
                self._rate_limited_until_s = self._retry_at_s
        finally:
            if not keep_lease:
                self._gossip.origin = False
                await self.lease_stack.aclose()

    async def _while_held(self, lease: OriginLease, source: str | None) -> None:
        tasks = {asyncio.ensure_future(w) for w in (self._read_and_seal(source), lease.wait_lost())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if lease.is_held:
                for task in tasks:
                    if task.done():
                        task.result()
            else:
                path = self._fetch.file.path
                raise Unavailable(f"the origin lease of {path} was lost; its leaves are kept")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _read_and_seal(self, source: str | None) -> None:
        fetch, partial = self._fetch, self._fetch.partial
        if partial.written:
            fetch.health.trusted_sources.add(UNKNOWN_SOURCE)
        if listed := await partial.adopt_held_leaves():
            self._gossip.publish_hashes(listed)
        self.notify()
        seals = fetch.wanted == partial.all_leaves and not self._lists.sealed_digest
        sealing = asyncio.ensure_future(sha256_of(partial, self._wait_leaves)) if seals else None
        try:
            await self._read(source)
            if sealing is None:
                return
            sha256 = await sealing
        finally:
            if sealing is not None:
                sealing.cancel()
                await asyncio.wait({sealing})
        if sha256 != fetch.blob:
            raise BlobHashMismatch(f"{fetch.file.path} hashes to {sha256[:16]}…", expected=fetch.blob, found=sha256)
        if self._lists.has_taken_list:
            return  # what was hashed may not be what that list says
        sealed = SealedList(fetch.blob, fetch.file.size_bytes, hash_leaf_list(partial.leaf_list))
        seal = await asyncio.to_thread(fetch.node_context.seals.sign, sealed, time.time())
        self._lists.use_own(sealed.leaf_list_digest, seal)

    async def _read(self, source: str | None) -> None:
        """Read until nothing is missing that no other node has."""
        fetch, node_context = self._fetch, self._fetch.node_context
        trusted_source = source or HUB

        def missing() -> int:
            return fetch.missing() & ~self._elsewhere()

        def on_leaf(leaf: int) -> None:
            fetch.health.trusted_sources.add(trusted_source)
            self._gossip.publish_hashes(1 << leaf)
            self.notify()
            fetch.notify()

        async def on_bytes(count: int) -> None:
            fetch.progress.record_received(trusted_source, count, fetch.file.path)

        def read(start: int, end: int) -> AbstractAsyncContextManager[Body]:
            return node_context.hub.read(fetch.manifest, fetch.file, start, end)

        if source is None:
            reader, name = hub_reader(read, fetch.progress.limiter_for(node_context.rate_limits.hub)), "the hub"
        else:
            wait_rate = fetch.progress.limiter_for(node_context.rate_limits.for_peer(source))
            reader = node_reader(node_context.peers, source, fetch.blob, fetch.file.size_bytes, wait_rate)
            name = f"node {source}"
            node_context.read_counts[source] += 1
        try:
            while fetch.missing():
                seen = self._leaves_changed.count
                fetch.progress.set_waiting_for("") if missing() else None
                await read_missing(
                    fetch.partial,
                    fetch.file.path,
                    name,
                    reader,
                    missing,
                    on_leaf,
                    on_bytes,
                    lambda: bool(self._lists.sealed_digest),
                )
                if fetch.missing():
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_POLL_INTERVAL_S):
                            await self._leaves_changed.wait_after(seen)
        finally:
            if source is not None:
                node_context.read_counts[source] -= 1

    async def close(self) -> None:
        """Stop reading. The lease stays as long as `lease_stack` is open."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
