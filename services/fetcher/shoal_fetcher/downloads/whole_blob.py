"""Fetches blobs too small to be relayed: whole from a node that has them, else from the hub, as their origin.

Other nodes wait for the origin. Storage hashes the whole blob by sha256 in any case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from shoal_common.errors import ShoalError, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import CommittedBlob
from shoal_fetcher.errors import BlobHashMismatch, RateLimited
from shoal_fetcher.hub.range_reader import Body, was_timeout
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.failure_policy import HUB, UNKNOWN_SOURCE, SourceHealth, waiting_text
from shoal_fetcher.sources.source_selection import FetchFromHub, FetchFromPeer, WaitForOrigin, choose_source
from shoal_fetcher.swarm.context import NodeFetchContext
from shoal_fetcher.swarm.origin import HubReader, hub_reader, node_reader, read_missing
from shoal_fetcher.swarm.origin_lease import OriginLease, acquire_origin

log = StructuredLogger("small")

_POLL_INTERVAL_S = 5.0
_STARTING_INTERVAL_S = 1.0
Commit = Callable[[ManifestFile, Progress], Awaitable[CommittedBlob]]
Turn = Callable[[Progress], AbstractAsyncContextManager[None]]


async def fetch(
    node_context: NodeFetchContext,
    manifest: Manifest,
    file: ManifestFile,
    health: SourceHealth,
    progress: Progress,
    commit: Commit,
    turn: Turn,
) -> CommittedBlob:
    """Make a small blob present. Raises BlobHashMismatch, and errors that no other source can help."""
    cluster_view = node_context.cluster_view
    while True:
        progress.check_stalled(file.path, health.last_error)
        version = cluster_view.version()
        holders = cluster_view.holders(file.blob, manifest)
        choice = choose_source(
            file.blob, holders, cluster_view.origin_of(file.blob), node_context.node, health, node_context.read_counts
        )
        if isinstance(choice, WaitForOrigin):
            progress.set_waiting_for(f"origin {choice.node}")
            # A stuck origin loses its lease after its own deadline: ours does not run meanwhile.
            progress.mark_progress()
            await cluster_view.wait_changed(version, _POLL_INTERVAL_S)
            continue
        if isinstance(choice, FetchFromHub) and health.askable(cluster_view.holders_restarting(file.blob, manifest)):
            await cluster_view.wait_changed(version, _STARTING_INTERVAL_S)
            continue
        if isinstance(choice, FetchFromHub) and node_context.is_denied(manifest, progress):
            await cluster_view.wait_changed(version, _POLL_INTERVAL_S)
            continue
        peer = choice.node if isinstance(choice, FetchFromPeer) else None
        try:
            async with turn(progress):
                progress.set_waiting_for("")
                if isinstance(choice, FetchFromPeer):
                    reader = node_reader(
                        node_context.peers,
                        choice.node,
                        choice.sha256,
                        file.size_bytes,
                        progress.limiter_for(node_context.rate_limits.for_peer(choice.node)),
                    )
                    node_context.read_counts[choice.node] += 1
                    try:
                        await _read(choice.node, node_context, file, reader, health, progress)
                    finally:
                        node_context.read_counts[choice.node] -= 1
                    return await commit(file, progress)
                committed = await _as_origin(node_context, manifest, file, health, progress, commit)
            if committed is not None:
                return committed
            await cluster_view.wait_changed(version, _POLL_INTERVAL_S)
        except BlobHashMismatch:
            raise
        except ShoalError as e:
            progress.record_source_failure(file.path, peer or HUB)
            if was_timeout(e):
                progress.record_switch(peer or HUB)
            has_peer = bool(health.not_banned(holders) or node_context.allowed_by_hub(manifest))
            delay_s = health.record_failure(e, peer, has_peer)
            log.warning("source failed", path=file.path, source=peer or HUB, reason=e.message, wait_s=delay_s)
            progress.set_waiting_for(waiting_text(e))
            await asyncio.sleep(delay_s)
            if isinstance(e, RateLimited):
                progress.mark_progress()


async def _as_origin(
    node_context: NodeFetchContext,
    manifest: Manifest,
    file: ManifestFile,
    health: SourceHealth,
    progress: Progress,
    commit: Commit,
) -> CommittedBlob | None:
    """Read the blob from the hub for all nodes. Returns None if another node is the origin or has just finished."""
    holding = await acquire_origin(node_context, file.blob)
    if holding is None:
        return None
    async with AsyncExitStack() as stack:
        lease = await stack.enter_async_context(holding)
        # The last origin may have finished between our check and our lease (I9).
        await node_context.cluster_view.wait_caught_up()
        if health.askable(node_context.cluster_view.holders(file.blob, manifest)):
            return None

        def read(start: int, end: int) -> AbstractAsyncContextManager[Body]:
            return node_context.hub.read(manifest, file, start, end)

        reader = hub_reader(read, progress.limiter_for(node_context.rate_limits.hub))
        await _while_held(lease, file, _read(HUB, node_context, file, reader, health, progress))
        committed = await commit(file, progress)
        # The lease is released only after that: the next holder checks `state` first.
        progress.after_publish(stack.pop_all())
        return committed


async def _while_held(lease: OriginLease, file: ManifestFile, work: Awaitable[None]) -> None:
    reading = asyncio.ensure_future(work)
    lost = asyncio.ensure_future(lease.wait_lost())
    try:
        await asyncio.wait({reading, lost}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise Unavailable(f"the origin lease of {file.path} was lost; its leaves are kept")
        reading.result()
    finally:
        lost.cancel()
        if not reading.done():
            reading.cancel()
            await asyncio.wait({reading})


async def _read(
    source: str,
    node_context: NodeFetchContext,
    file: ManifestFile,
    reader: HubReader,
    health: SourceHealth,
    progress: Progress,
) -> None:
    partial = node_context.partial_blob(file)
    try:
        async with partial:
            if partial.written and not health.trusted_sources:
                health.trusted_sources.add(UNKNOWN_SOURCE)
            if partial.written != partial.all_leaves:
                health.trusted_sources.add(source)

            async def on_bytes(count: int) -> None:
                progress.record_received(source, count, file.path)
                progress.check_stalled(file.path, None)  # bytes may trickle in for ever

            def missing() -> int:
                return partial.all_leaves & ~partial.written

            def on_leaf(leaf: int) -> None:
                """Leaves of small blobs are not gossiped."""

            name = "the hub" if source == HUB else f"node {source}"
            await read_missing(partial, file.path, name, reader, missing, on_leaf, on_bytes, sealed=lambda: True)
    finally:
        progress.set_durable_bytes(file.blob, partial.durable_bytes)
