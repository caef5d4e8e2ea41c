"""Fetches one blob: choose a source, read what is missing, have storage verify and commit it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from shoal_common import telemetry
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import LeafListSeal, Manifest, ManifestFile
from shoal_common.messages.storage import CommittedBlob
from shoal_fetcher.downloads import whole_blob
from shoal_fetcher.errors import BlobHashMismatch, LeafReadbackMismatch
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.failure_policy import HUB, SourceHealth
from shoal_fetcher.sources.source_selection import FetchFromHub, choose_source, is_relayed
from shoal_fetcher.storage_client import StorageClient
from shoal_fetcher.swarm.context import BlobFetchContext, NodeFetchContext
from shoal_fetcher.swarm.swarm import Swarm

log = StructuredLogger("fetch")

MAX_CONCURRENT_BLOBS = 8
"""Blobs that are fetched at the same time, for all downloads of this node."""
_MAX_LEAVES_LOST = 3
"""A disk that reads back wrong leaves this many times is not written to again."""


class _Arrival(msgspec.Struct):
    """A blob being fetched, while any download of this node wants it."""

    lock: asyncio.Lock
    wanted_count: int = 0
    committed: CommittedBlob | None = None


class BlobFetcher:
    """Fetches blobs for all downloads of this node; each blob once at a time."""

    def __init__(self, node_context: NodeFetchContext, storage: StorageClient) -> None:
        self._node_context, self._storage = node_context, storage
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_BLOBS)
        self._arriving: dict[str, _Arrival] = {}

    async def fetch(
        self, manifest: Manifest, file: ManifestFile, progress: Progress, wanted: int | None = None
    ) -> str:
        """Make a blob present. Returns its sha256, which peers learn from the next update of `progress`.

        `wanted`: only these leaves (a leaf set) of a relayed blob. They are durable on return, and the blob stays
        partial unless it was complete already.
        """
        # Two downloads may share a blob: one fetches it while the other waits.
        arrival = self._arriving.setdefault(file.blob, _Arrival(asyncio.Lock()))
        arrival.wanted_count += 1
        try:
            async with arrival.lock:
                if arrival.committed is None:
                    with telemetry.trace_step("file", path=file.path, size_bytes=file.size_bytes):
                        arrival.committed = await self._fetch(manifest, file, progress, wanted)
                    if arrival.committed is None:
                        return file.blob
                else:
                    committed = arrival.committed
                    progress.set_blob_complete(
                        file.blob, committed.sha256, committed.size_bytes, committed.leaf_list_digest
                    )
                return arrival.committed.sha256
        finally:
            arrival.wanted_count -= 1
            if not arrival.wanted_count:
                del self._arriving[file.blob]

    def expected_source(self, manifest: Manifest, file: ManifestFile) -> str:
        """Return the source that a blob would come from now: `hub` or a node."""
        node_context = self._node_context
        holders = node_context.cluster_view.holders(file.blob, manifest)
        origin = node_context.cluster_view.origin_of(file.blob)
        choice = choose_source(
            file.blob, holders, origin, node_context.node, SourceHealth(), node_context.read_counts
        )
        return HUB if isinstance(choice, FetchFromHub) else choice.node

    async def _fetch(
        self, manifest: Manifest, file: ManifestFile, progress: Progress, wanted: int | None
    ) -> CommittedBlob | None:
        """Return None if only some leaves were wanted, and they are present."""
        health, lost_count = SourceHealth(), 0
        while True:
            try:
                if is_relayed(file.blob, file.size_bytes):
                    async with self._slot(progress):
                        return await self._fetch_from_swarm(manifest, file, health, progress, wanted)
                return await whole_blob.fetch(
                    self._node_context, manifest, file, health, progress, self._commit, self._slot
                )
            except LeafReadbackMismatch as e:
                lost_count += 1
                if lost_count == _MAX_LEAVES_LOST:
                    raise
                log.warning(
                    "leaves were not written correctly, fetching them again", path=file.path, reason=e.message
                )
            except BlobHashMismatch as e:
                # Bans the sources whose hashes were trusted; raises if that has happened before.
                health.record_failure(e, None)
                progress.record_source_failure(file.path)
                log.warning("blob does not hash to its name, fetching it again", path=file.path, reason=e.message)
                progress.set_waiting_for(e.message)

    @asynccontextmanager
    async def _slot(self, progress: Progress) -> AsyncIterator[None]:
        queued_at_s = time.monotonic()
        async with self._slots:
            progress.pause_stall_timer(time.monotonic() - queued_at_s)
            yield

    async def _fetch_from_swarm(
        self, manifest: Manifest, file: ManifestFile, health: SourceHealth, progress: Progress, wanted: int | None
    ) -> CommittedBlob | None:
        progress.set_waiting_for("")
        began_s = time.monotonic()
        async with AsyncExitStack() as stack:
            partial = self._node_context.partial_blob(file)
            try:
                async with partial:
                    progress.pause_stall_timer(
                        time.monotonic() - began_s
                    )  # after a power cut the leaves were hashed again
                    leaves = partial.all_leaves if wanted is None else partial.all_leaves & wanted
                    fetch = BlobFetchContext(
                        self._node_context, manifest, file, partial, health, progress, leaves, lambda: None
                    )
                    leaf_list_digest, seal = await Swarm(fetch, stack).run()
            except BlobHashMismatch:
                # The commit hashes it too, reports the hash and discards it.
                leaf_list_digest, seal, leaves = "", None, partial.all_leaves
            finally:
                progress.set_durable_bytes(file.blob, partial.durable_bytes)
            if leaves != partial.all_leaves:
                return None
            committed = await self._commit(file, progress, leaf_list_digest, seal)
            # The origin lease is released only after that: the next holder checks `state` first.
            progress.after_publish(stack.pop_all())
            return committed

    async def _commit(
        self, file: ManifestFile, progress: Progress, leaf_list_digest: str = "", seal: LeafListSeal | None = None
    ) -> CommittedBlob:
        try:
            committed = await self._storage.commit(file.blob, leaf_list_digest, seal)
        except BlobHashMismatch:
            progress.set_durable_bytes(file.blob, 0)  # storage has discarded all leaves
            raise
        progress.set_blob_complete(file.blob, committed.sha256, committed.size_bytes, committed.leaf_list_digest)
        return committed
