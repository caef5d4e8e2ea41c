"""Bringing one blob in: choose a source, read what is missing, have storage verify and commit it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from shoal_common import telemetry
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.messages.questions import Committed
from shoal_common.messages.records import Manifest, ManifestFile
from shoal_fetcher import small
from shoal_fetcher.decide import Setbacks, is_relayed
from shoal_fetcher.errors import LeavesLost, WrongWhole
from shoal_fetcher.partial import PartialBlob
from shoal_fetcher.progress import Progress
from shoal_fetcher.storage import Storage
from shoal_fetcher.swarm.shared import Fetch, Shared
from shoal_fetcher.swarm.swarm import Swarm

log = Log("fetch")

AT_ONCE = 8
"""Blobs that arrive at the same time, for all downloads of this node."""
_LEAVES_LOST_TRIES = 3
"""A disk that so often gives back something else than was written is not written to again."""


class _Arrival(msgspec.Struct):
    """A blob on its way, for as long as somebody here wants it."""

    one: asyncio.Lock
    wanted_count: int = 0
    committed: Committed | None = None


class BlobFetcher:
    """Fetches blobs for all downloads of this node; each blob once at a time."""

    def __init__(self, shared: Shared, layout: Layout, storage: Storage) -> None:
        self._shared, self._layout, self._storage = shared, layout, storage
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._arriving: dict[str, _Arrival] = {}

    async def fetch(
        self, manifest: Manifest, file: ManifestFile, progress: Progress, wanted: int | None = None
    ) -> str:
        """Make a blob present. Returns its sha256; peers hear of it with the next word of `progress`.

        `wanted`: only these leaves (a set, `shoal_common/runs.py`) of a blob that is relayed: they are durable when
        this returns, and the blob stays a partial, unless it was whole already.
        """
        # Two models on their way may share a blob: one brings it in while the other waits for it.
        arrival = self._arriving.setdefault(file.blob, _Arrival(asyncio.Lock()))
        arrival.wanted_count += 1
        try:
            async with arrival.one:
                if arrival.committed is None:
                    with telemetry.step("file", path=file.path, size_bytes=file.size_bytes):
                        arrival.committed = await self._fetch(manifest, file, progress, wanted)
                    if arrival.committed is None:
                        return file.blob
                else:
                    committed = arrival.committed
                    progress.whole(file.blob, committed.sha256, committed.size_bytes, committed.root)
                return arrival.committed.sha256
        finally:
            arrival.wanted_count -= 1
            if not arrival.wanted_count:
                del self._arriving[file.blob]

    async def _fetch(
        self, manifest: Manifest, file: ManifestFile, progress: Progress, wanted: int | None
    ) -> Committed | None:
        """None when only a part was wanted, and is here."""
        setbacks, lost_count = Setbacks(), 0
        while True:
            try:
                if is_relayed(file.blob, file.size_bytes):
                    async with self._turn(progress):
                        return await self._by_swarm(manifest, file, setbacks, progress, wanted)
                return await small.fetch(
                    self._shared, self._layout, manifest, file, setbacks, progress, self._commit, self._turn
                )
            except LeavesLost as e:
                lost_count += 1
                if lost_count == _LEAVES_LOST_TRIES:
                    raise
                log.warning("fetching leaves again", path=file.path, why=e.message)
            except WrongWhole as e:
                # Whose word was taken for it is banned; raises when that was so before.
                setbacks.after(e, None)
                log.warning("starting again", path=file.path, why=e.message)
                progress.note(e.message)

    @asynccontextmanager
    async def _turn(self, progress: Progress) -> AsyncIterator[None]:
        queued_at_s = time.monotonic()
        async with self._gate:
            progress.excuse(time.monotonic() - queued_at_s)
            yield

    async def _by_swarm(
        self, manifest: Manifest, file: ManifestFile, setbacks: Setbacks, progress: Progress, wanted: int | None
    ) -> Committed | None:
        await progress.say(waiting_for="")
        began_s = time.monotonic()
        async with AsyncExitStack() as held:
            partial = PartialBlob(self._layout, file.blob, file.size_bytes)
            try:
                async with partial:
                    progress.excuse(time.monotonic() - began_s)  # after a power cut all of it was hashed again
                    leaves = partial.all if wanted is None else partial.all & wanted
                    fetch = Fetch(self._shared, manifest, file, partial, setbacks, progress, leaves, lambda: None)
                    root = await Swarm(fetch, held).run()
            except WrongWhole:
                root, leaves = "", partial.all  # storage finds so too, says what it hashes to, and discards it
            finally:
                progress.durable(file.blob, partial.durable_bytes)
            if leaves != partial.all:
                return None
            committed = await self._commit(file, progress, root)
            # Only then goes an origin's lease back: who takes it next looks in `state` first.
            progress.when_told(held.pop_all())
            return committed

    async def _commit(self, file: ManifestFile, progress: Progress, root: str = "") -> Committed:
        try:
            committed = await self._storage.commit(file.blob, root)
        except WrongWhole:
            progress.durable(file.blob, 0)  # storage has discarded them all
            raise
        progress.whole(file.blob, committed.sha256, committed.size_bytes, committed.root)
        return committed
