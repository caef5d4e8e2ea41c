"""Fetches all of a model: reserve, fetch every missing blob, seal."""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec
from msgspec import structs

from shoal_common.bus.events import EventEmitter
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.identity.seals import SealKeeper
from shoal_common.messages.manifest import LeafListSeal, Manifest, ManifestFile
from shoal_common.rpc.request_reply import RpcClient
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads.blob_fetcher import BlobFetcher
from shoal_fetcher.downloads.events import Fetched, Reserved
from shoal_fetcher.downloads.request_store import DownloadRequests
from shoal_fetcher.hub.client import HubClient
from shoal_fetcher.hub.listings import HubListings
from shoal_fetcher.partials.bitmap_file import resumable_bytes
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.source_selection import with_known_sha256
from shoal_fetcher.storage_client import StorageClient

_MAX_CONCURRENT_FILES = 32
"""Files of one download that are fetched or wait for a source at a time."""

WantedFiles = list[tuple[ManifestFile, int | None]]
"""Files to fetch, and of each the wanted leaves; None: all of it."""


class LeafListReader(Protocol):
    """Reads leaf lists from nodes."""

    async def sealed_leaf_list(self, node: str, blob: str, size_bytes: int) -> tuple[bytes, LeafListSeal | None]:
        """Return a blob's leaf list, and its seal, as a node sends them. Raises ShoalError."""


class DownloadContext(msgspec.Struct, frozen=True):
    """What all downloads of this node share."""

    node: str
    layout: StorePaths
    buckets: Buckets
    rpc: RpcClient
    events: EventEmitter
    storage: StorageClient
    hub: HubClient
    cluster_view: ClusterView
    blobs: BlobFetcher
    leaf_lists: LeafListReader
    seals: SealKeeper
    listings: HubListings
    requests: DownloadRequests


class FetchPlan(Protocol):
    """What a download reserves and fetches, in rounds, and then seals. Raises what storage and sources raise."""

    async def reserve(self, again: bool) -> Reserved:
        """Reserve what this round is about to fetch. `again`: begin with the first round."""

    async def fetch(self) -> Fetched:
        """Fetch what is missing of it."""

    async def seal(self) -> None:
        """Have storage verify and keep what was fetched."""


class FileFetcher:
    """Fetches files of one download at the same time."""

    def __init__(self, model: str, manifest: Manifest, context: DownloadContext, progress: Progress) -> None:
        self._model, self._manifest, self._context, self._progress = model, manifest, context, progress
        self._has_started = False

    async def fetch(self, files: WantedFiles, **figures: int) -> dict[str, str]:
        """Make files present. Returns the sha256 of blobs that were known by git's name only.

        `figures` are fields of the event `download_started`.
        """
        known: dict[str, str] = {}
        slots = asyncio.Semaphore(_MAX_CONCURRENT_FILES)

        async def fetch(file: ManifestFile, wanted: int | None) -> None:
            async with slots:
                sha256 = await self._context.blobs.fetch(self._manifest, file, self._progress, wanted)
            if sha256 != file.blob:
                known[file.blob] = sha256

        await self._emit_started([file for file, _ in files], figures)
        try:
            async with asyncio.TaskGroup() as tasks:
                # Largest first: the last file to finish is then a small one.
                for file, wanted in sorted(files, key=lambda pair: -pair[0].size_bytes):
                    tasks.create_task(fetch(file, wanted))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first failure has cancelled the others
        return known

    async def _emit_started(self, files: list[ManifestFile], figures: dict[str, int]) -> None:
        """Emit `download_started`, once, with the source that the largest missing file is to come from."""
        if self._has_started or not files:
            return
        self._has_started = True
        largest = max(files, key=lambda file: file.size_bytes)
        source = self._context.blobs.expected_source(self._manifest, largest)
        fields: dict[str, object] = {**figures, **({"source": source} if source else {})}
        await self._context.events.emit("download_started", model=self._model, **fields)


class ModelFetch:
    """Fetches a whole model, in one round."""

    def __init__(self, manifest: Manifest, context: DownloadContext, progress: Progress, files: FileFetcher) -> None:
        self._manifest, self._context, self._progress, self._files = manifest, context, progress, files
        self._missing: list[ManifestFile] = []
        self._known: dict[str, str] = {}
        self._has_counted_resumed = False

    async def reserve(self, again: bool) -> Reserved:
        """Reserve all of it, and count what is present."""
        manifest, progress = self._manifest, self._progress
        progress.set_state(structs.replace(progress.state, total_bytes=manifest.size_bytes))
        reserved = await self._context.storage.reserve(manifest)
        self._known, self._missing = dict(reserved.sha256_by_git_name), []
        present = set(reserved.present)
        progress.reset_counts()
        for blob, file in {f.blob: f for f in manifest.files}.items():
            sha256 = self._known.get(blob, blob)
            if sha256 in present:
                progress.set_blob_complete(blob, sha256, file.size_bytes)
            else:
                durable_bytes = await asyncio.to_thread(resumable_bytes, self._context.layout, blob, file.size_bytes)
                progress.set_durable_bytes(blob, durable_bytes)
                self._missing.append(file)
        if not self._has_counted_resumed:
            self._has_counted_resumed = True
            progress.set_state(structs.replace(progress.state, resumed_bytes=progress.done_bytes))
        return Reserved()

    async def fetch(self) -> Fetched:
        """Fetch every missing blob."""
        missing: WantedFiles = [(file, None) for file in self._missing]
        self._known |= await self._files.fetch(missing, size_bytes=self._manifest.size_bytes)
        return Fetched()

    async def seal(self) -> None:
        """Have storage make the model present."""
        await self._context.storage.seal(with_known_sha256(self._manifest, self._known))
