"""Bringing one blob in: choose a source, read what is missing, have storage verify and commit it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import httpx2
import msgspec

from shoal_common import telemetry
from shoal_common.buckets import Buckets, origin_key
from shoal_common.credentials import bearer
from shoal_common.errors import Corrupt, DiskFull, ShoalError, Unavailable
from shoal_common.layout import Layout
from shoal_common.leases import Lease, acquire, holding
from shoal_common.logs import Log
from shoal_common.messages.questions import Committed
from shoal_common.messages.records import Manifest, ManifestFile
from shoal_fetcher.decide import EARLIER, HUB, FromPeer, Setbacks, WaitFor, choose
from shoal_fetcher.errors import RateLimited, WrongWhole
from shoal_fetcher.http_range import Body, blob_url, peer_source, read_range
from shoal_fetcher.hub import Hub
from shoal_fetcher.limits import Limits
from shoal_fetcher.partial import PartialBlob
from shoal_fetcher.progress import Progress
from shoal_fetcher.rates import Rates
from shoal_fetcher.storage import Storage
from shoal_fetcher.surroundings import Surroundings

log = Log("fetch")

NO_PROGRESS_S = 120.0
"""A download to which nothing was added for so long fails, naming what it waited for (I7)."""
AT_ONCE = 8
"""Blobs that arrive at the same time, for all downloads of this node."""
_LOOK_AGAIN_S = 5.0

Reader = Callable[[int, int], AbstractAsyncContextManager[Body]]
"""Opens a source at bytes [start, end)."""


class _Arrival(msgspec.Struct):
    """A blob on its way, for as long as somebody here wants it."""

    one: asyncio.Lock
    wanted_count: int = 0
    committed: Committed | None = None


class BlobFetcher:
    """Fetches blobs for all downloads of this node; each blob once at a time."""

    def __init__(
        self,
        node: str,
        uid: str,
        secret: str,
        layout: Layout,
        buckets: Buckets,
        storage: Storage,
        hub: Hub,
        peers: httpx2.AsyncClient,
        around: Surroundings,
        limits: Limits,
    ) -> None:
        self._node, self._uid, self._layout = node, uid, layout
        self._buckets, self._storage, self._hub, self._peers = buckets, storage, hub, peers
        self._around, self._rates, self._limits = around, Rates(), limits
        self._credentials = bearer(secret, "blobs")
        self._busy: Counter[str] = Counter()
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._arriving: dict[str, _Arrival] = {}

    async def fetch(self, manifest: Manifest, file: ManifestFile, progress: Progress) -> str:
        """Make a blob present. Returns its sha256; peers hear of it with the next word of `progress`."""
        # Two models on their way may share a blob: one brings it in while the other waits for it.
        arrival = self._arriving.setdefault(file.blob, _Arrival(asyncio.Lock()))
        arrival.wanted_count += 1
        try:
            async with arrival.one:
                if arrival.committed is None:
                    with telemetry.step("file", path=file.path, size_bytes=file.size_bytes):
                        arrival.committed = await self._fetch(manifest, file, progress)
                else:
                    progress.whole(file.blob, arrival.committed.sha256, arrival.committed.size_bytes)
                return arrival.committed.sha256
        finally:
            arrival.wanted_count -= 1
            if not arrival.wanted_count:
                del self._arriving[file.blob]

    async def _fetch(self, manifest: Manifest, file: ManifestFile, progress: Progress) -> Committed:
        setbacks = Setbacks()
        while True:
            if progress.still_s > NO_PROGRESS_S:
                why = setbacks.last.message if setbacks.last else progress.state.waiting_for
                raise Unavailable(
                    f"nothing was added to {file.path} for {NO_PROGRESS_S:.0f} s ({why}); pull again to resume"
                )
            seen = self._around.seen()
            found = self._around.holders(file.blob, manifest)
            origin = self._around.origin(file.blob)
            choice = choose(file.blob, found, origin, self._node, setbacks, self._busy)
            if isinstance(choice, WaitFor):
                await self._wait_for(choice.node, seen, progress)
                continue
            peer = choice.node if isinstance(choice, FromPeer) else None
            try:
                queued_at_s = time.monotonic()
                async with self._gate:
                    progress.excuse(time.monotonic() - queued_at_s)
                    if isinstance(choice, FromPeer):
                        return await self._from_peer(choice, file, setbacks, progress)
                    committed = await self._as_origin(manifest, file, setbacks, progress)
                if committed is not None:
                    return committed
                await self._around.changed(seen, _LOOK_AGAIN_S)
            except ShoalError as e:
                if isinstance(e.__cause__, httpx2.TimeoutException):
                    progress.left(peer or HUB)
                delay_s = setbacks.after(e, peer, hopes=bool(setbacks.trusted(found)))
                log.warning("a source failed", path=file.path, source=peer or HUB, why=e.message, wait_s=delay_s)
                await progress.say(waiting_for=e.message)
                await asyncio.sleep(delay_s)
                if isinstance(e, RateLimited):
                    progress.moved()

    async def _wait_for(self, origin: str, seen: tuple[int, ...], progress: Progress) -> None:
        await progress.say(waiting_for=f"origin {origin}")
        # An origin that gets nowhere loses its lease after its own deadline: ours does not run meanwhile.
        progress.moved()
        await self._around.changed(seen, _LOOK_AGAIN_S)

    async def _from_peer(
        self, choice: FromPeer, file: ManifestFile, setbacks: Setbacks, progress: Progress
    ) -> Committed:
        await progress.say(waiting_for="")
        peer = choice.node
        source = peer_source(peer)
        addresses = self._rates.order(peer, self._around.addresses().get(peer, []), time.monotonic())
        error: ShoalError = Unavailable(f"node {peer} says no address")
        self._busy[peer] += 1
        try:
            for address in addresses:

                @asynccontextmanager
                async def read(start: int, end: int, address: str = address) -> AsyncIterator[Body]:
                    url, began_s = blob_url(address, choice.sha256), time.monotonic()
                    async with read_range(self._peers, url, self._credentials, start, end, source) as body:
                        yield body
                    now_s = time.monotonic()
                    self._rates.measured(peer, address, end - start, now_s - began_s, now_s)

                try:
                    await self._read(peer, file, read, setbacks, progress)
                    break
                except (Corrupt, DiskFull):
                    raise
                except ShoalError as e:
                    error = e
                    if isinstance(e, Unavailable):
                        self._rates.failed(peer, address, time.monotonic())
            else:
                raise error
            return await self._commit(file, progress)
        finally:
            self._busy[peer] -= 1

    async def _as_origin(
        self, manifest: Manifest, file: ManifestFile, setbacks: Setbacks, progress: Progress
    ) -> Committed | None:
        """Read from the hub for everyone. None when somebody else is the origin, or has just finished."""
        lease = await acquire(self._buckets.lease, origin_key(file.blob), self._node, self._uid)
        if lease is None:
            return None
        async with AsyncExitStack() as held:
            await held.enter_async_context(holding(lease))
            # The last origin may have finished between our look and our taking the lease (I9).
            await self._around.catch_up()
            if setbacks.usable(self._around.holders(file.blob, manifest)):
                return None
            await progress.say(waiting_for="")

            def read(start: int, end: int) -> AbstractAsyncContextManager[Body]:
                return self._hub.read(manifest, file, start, end)

            await self._while_held(lease, file, read, setbacks, progress)
            committed = await self._commit(file, progress)
            # Only then goes the lease back: who takes it next looks in `state` first.
            progress.when_told(held.pop_all())
            return committed

    async def _while_held(
        self, lease: Lease, file: ManifestFile, read: Reader, setbacks: Setbacks, progress: Progress
    ) -> None:
        reading = asyncio.ensure_future(self._read(HUB, file, read, setbacks, progress))
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
        self, source: str, file: ManifestFile, read: Reader, setbacks: Setbacks, progress: Progress
    ) -> None:
        """Read all missing ranges of a blob into its partial."""
        pace = self._limits.hub if source == HUB else self._limits.peer(source)
        partial = PartialBlob(self._layout.partial(file.blob), file.size_bytes)
        try:
            async with partial:
                if partial.durable_bytes and not setbacks.givers:
                    setbacks.givers.add(EARLIER)
                for start, end in partial.bitmap.missing_runs():
                    if partial.holds(start, end):
                        continue  # a source that ignores ranges has sent it before
                    async with read(start, end) as body:
                        partial.begin_at(body.begin)
                        setbacks.givers.add(source)
                        async for chunk in body.chunks:
                            await progress.paced(pace, len(chunk))
                            progress.received(source, len(chunk))
                            await partial.write(chunk)
                            progress.durable(file.blob, partial.durable_bytes)
                            if partial.overflowing:
                                raise Corrupt(f"{source} sends more bytes for {file.path} than it has")
        finally:
            progress.durable(file.blob, partial.durable_bytes)
        missing = file.size_bytes - partial.durable_bytes
        if missing:
            raise Unavailable(f"{source} ended early: {missing} bytes of {file.path} are missing")

    async def _commit(self, file: ManifestFile, progress: Progress) -> Committed:
        try:
            committed = await self._storage.commit(file.blob)
        except WrongWhole:
            progress.durable(file.blob, 0)  # storage has discarded them all
            raise
        progress.whole(file.blob, committed.sha256, committed.size_bytes)
        return committed
