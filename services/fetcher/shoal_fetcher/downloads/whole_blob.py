"""Fetches blobs too small to be relayed: whole from a node that has them, else from the hub, as their origin.

Other nodes wait for the origin. Storage hashes the whole blob by sha256 in any case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from shoal_common.bus.cluster_lease import Lease, acquire, holding
from shoal_common.bus.keys import origin_key
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.logs import Log
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import Committed
from shoal_common.store.store_paths import Layout
from shoal_fetcher.errors import RateLimited, WrongWhole
from shoal_fetcher.hub.range_reader import Body, was_silent
from shoal_fetcher.partials.partial_blob import PartialBlob
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.failure_policy import EARLIER, HUB, Setbacks
from shoal_fetcher.sources.source_selection import FromHub, FromPeer, WaitFor, choose
from shoal_fetcher.swarm.context import Shared
from shoal_fetcher.swarm.origin import Reader, from_hub, from_node, read_missing
from shoal_fetcher.swarm.swarm import NO_PROGRESS_S

log = Log("small")

_POLL_INTERVAL_S = 5.0
_STARTING_INTERVAL_S = 1.0
Commit = Callable[[ManifestFile, Progress], Awaitable[Committed]]
Turn = Callable[[Progress], AbstractAsyncContextManager[None]]


async def fetch(
    shared: Shared,
    layout: Layout,
    manifest: Manifest,
    file: ManifestFile,
    setbacks: Setbacks,
    progress: Progress,
    commit: Commit,
    turn: Turn,
) -> Committed:
    """Make a small blob present. Raises BlobHashMismatch, and errors that no other source can help."""
    around = shared.around
    while True:
        if progress.still_s > NO_PROGRESS_S:
            reason = setbacks.last.message if setbacks.last else progress.state.waiting_for
            raise Unavailable(
                f"no progress on {file.path} for {NO_PROGRESS_S:.0f} s ({reason}); pull again to resume"
            )
        version = around.seen()
        holders = around.holders(file.blob, manifest)
        choice = choose(file.blob, holders, around.origin(file.blob), shared.node, setbacks, shared.busy)
        if isinstance(choice, WaitFor):
            await progress.say(waiting_for=f"origin {choice.node}")
            # A stuck origin loses its lease after its own deadline: ours does not run meanwhile.
            progress.moved()
            await around.changed(version, _POLL_INTERVAL_S)
            continue
        if isinstance(choice, FromHub) and setbacks.usable(around.returning(file.blob, manifest)):
            await around.changed(version, _STARTING_INTERVAL_S)
            continue
        peer = choice.node if isinstance(choice, FromPeer) else None
        try:
            async with turn(progress):
                await progress.say(waiting_for="")
                if isinstance(choice, FromPeer):
                    reader = from_node(
                        shared.peers,
                        choice.node,
                        choice.sha256,
                        file.size_bytes,
                        progress.pacing(shared.limits.peer(choice.node)),
                    )
                    shared.busy[choice.node] += 1
                    try:
                        await _read(choice.node, layout, file, reader, setbacks, progress)
                    finally:
                        shared.busy[choice.node] -= 1
                    return await commit(file, progress)
                committed = await _as_origin(shared, layout, manifest, file, setbacks, progress, commit)
            if committed is not None:
                return committed
            await around.changed(version, _POLL_INTERVAL_S)
        except WrongWhole:
            raise
        except ShoalError as e:
            progress.source_failed(file.path, peer or HUB)
            if was_silent(e):
                progress.left(peer or HUB)
            delay_s = setbacks.after(e, peer, hopes=bool(setbacks.trusted(holders)))
            log.warning("source failed", path=file.path, source=peer or HUB, reason=e.message, wait_s=delay_s)
            await progress.say(waiting_for=e.message)
            await asyncio.sleep(delay_s)
            if isinstance(e, RateLimited):
                progress.moved()


async def _as_origin(
    shared: Shared,
    layout: Layout,
    manifest: Manifest,
    file: ManifestFile,
    setbacks: Setbacks,
    progress: Progress,
    commit: Commit,
) -> Committed | None:
    """Read the blob from the hub for all nodes. Returns None if another node is the origin or has just finished."""
    lease = await acquire(shared.buckets.lease, origin_key(file.blob), shared.node, shared.uid)
    if lease is None:
        return None
    async with AsyncExitStack() as held:
        await held.enter_async_context(holding(lease))
        # The last origin may have finished between our check and our lease (I9).
        await shared.around.catch_up()
        if setbacks.usable(shared.around.holders(file.blob, manifest)):
            return None

        def read(start: int, end: int) -> AbstractAsyncContextManager[Body]:
            return shared.hub.read(manifest, file, start, end)

        reader = from_hub(read, progress.pacing(shared.limits.hub))
        await _while_held(lease, file, _read(HUB, layout, file, reader, setbacks, progress))
        committed = await commit(file, progress)
        # The lease is released only after that: the next holder checks `state` first.
        progress.when_told(held.pop_all())
        return committed


async def _while_held(lease: Lease, file: ManifestFile, work: Awaitable[None]) -> None:
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
    source: str, layout: Layout, file: ManifestFile, reader: Reader, setbacks: Setbacks, progress: Progress
) -> None:
    partial = PartialBlob(layout, file.blob, file.size_bytes)
    try:
        async with partial:
            if partial.here and not setbacks.givers:
                setbacks.givers.add(EARLIER)
            if partial.here != partial.all:
                setbacks.givers.add(source)

            async def on_bytes(count: int) -> None:
                progress.received(source, count, file.path)

            def missing() -> int:
                return partial.all & ~partial.here

            def on_leaf(leaf: int) -> None:
                """Leaves of small blobs are not gossiped."""

            name = "the hub" if source == HUB else f"node {source}"
            await read_missing(partial, file.path, name, reader, missing, on_leaf, on_bytes, sealed=lambda: True)
    finally:
        progress.durable(file.blob, partial.durable_bytes)
