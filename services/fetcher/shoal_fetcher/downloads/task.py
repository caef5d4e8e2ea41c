"""One download, from `queued` to its end: resolve, reserve, fetch every missing blob, seal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from msgspec import structs

from shoal_common import telemetry
from shoal_common.bus import cluster_clock
from shoal_common.bus.events import EventEmitter
from shoal_common.bus.keys import download_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.errors import Cancelled, DiskFull, HubUnavailable, InternalError, Paused, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import ENDED_PHASES, DownloadPhase, DownloadState
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import GetManifest
from shoal_common.names import ModelRef, is_commit
from shoal_common.rpc.request_reply import RpcClient
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads.blob_fetcher import BlobFetcher
from shoal_fetcher.downloads.disk_full_wait import DiskFullWait
from shoal_fetcher.downloads.request_store import DownloadRequests
from shoal_fetcher.downloads.shard_fetch import LeafListReader, ShardFetch, sealed_lists
from shoal_fetcher.errors import RateLimited, ReservationLost
from shoal_fetcher.hub.client import HubClient
from shoal_fetcher.partials.bitmap_file import resumable_bytes
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.failure_policy import RETRY_BACKOFF, end_phase
from shoal_fetcher.sources.source_changes import SourceChange
from shoal_fetcher.sources.source_selection import with_known_sha256
from shoal_fetcher.storage_client import StorageClient

log = StructuredLogger("download")

_MAX_RESOLVE_ATTEMPTS = 4
_MAX_RESERVE_ATTEMPTS = 3
_MAX_CONCURRENT_FILES = 32
"""Files of one download that are fetched or wait for a source at a time."""


class DownloadTask:
    """One model being downloaded to this node. `run` it as a task; `ended` resolves with the result."""

    def __init__(
        self,
        ref: ModelRef,
        node: str,
        layout: StorePaths,
        buckets: Buckets,
        rpc: RpcClient,
        events: EventEmitter,
        storage: StorageClient,
        hub: HubClient,
        cluster_view: ClusterView,
        blobs: BlobFetcher,
        requests: DownloadRequests,
        leaf_lists: LeafListReader,
        layers: list[list[int]],
        previous_state: DownloadState | None,
        result: asyncio.Future[DownloadState] | None,
        is_needed_elsewhere: Callable[[DownloadTask], bool],
    ) -> None:
        self.ref, self._node, self._layout = ref, node, layout
        self._buckets, self._rpc, self._events, self._storage, self._hub = buckets, rpc, events, storage, hub
        self._cluster_view, self._blobs, self._requests, self._leaf_lists = cluster_view, blobs, requests, leaf_lists
        self.layers = layers
        """The layers whose tensors it fetches; empty: the whole model."""
        self._wanted_elsewhere = is_needed_elsewhere
        self._key = download_key(node, str(ref))
        self._reserved_commit = previous_state.commit if previous_state else ""
        """Commit for which storage may hold a reservation of this download, from this process or an earlier one."""
        self._previous_blobs = previous_state.blobs if previous_state else []
        self._resumed_published = self._has_started = False
        self._ending = False
        now_s = round(cluster_clock.now_s(), 3)
        state = previous_state or DownloadState(node=node, model=str(ref), phase="queued", started_at_s=now_s)
        if state.phase in ENDED_PHASES:
            state = structs.replace(state, sources={}, source_switches={}, started_at_s=now_s, blocked_since_s=0.0)
        # After a restart the download continues. What an ended download left on the disk counts as well, until
        # storage says what is present: a hub that is down must not discard what has arrived.
        self.progress = Progress(
            buckets.state,
            structs.replace(state, phase="queued", resumed_bytes=0, layers=layers),
            self._emit_source_change,
        )
        self._disk_full_wait = DiskFullWait(self.progress, storage, cluster_view, layout)
        self.result = result or asyncio.get_running_loop().create_future()
        self.result.add_done_callback(lambda f: f.cancelled() or f.exception())

    @property
    def commit(self) -> str:
        """The commit being fetched; "" until it is known."""
        return self._reserved_commit

    async def run(self) -> None:
        """Download the model. On return `ended` is set, the state is published and the request deleted."""
        publishing = asyncio.create_task(self.progress.publish_forever())
        try:
            with telemetry.trace_step("transfer", model=str(self.ref)), telemetry.count_running_download():
                await self._download()
            self._ending = True
            await self._end("ready", None)
        except Exception as e:  # noqa: BLE001  # callers must get a result, and one failed download must not end the others
            self._ending = True
            error = _as_shoal_error(e, self.ref)
            log.warning("download failed", model=str(self.ref), reason=error.message, code=error.code)
            if not self.progress.done_bytes:
                with suppress(ShoalError):
                    await self._release()
            await self._end(end_phase(error), error)
            await self._emit_failure(error)
        finally:
            publishing.cancel()
            await self.progress.close()

    async def stop(self, running: asyncio.Task[None]) -> bool:
        """Stop, and keep the bytes and the reservation. Returns False if the download ended by itself."""
        if not self._ending:  # do not interrupt an end that has begun
            running.cancel()
        await asyncio.wait({running})
        return not self.result.done()

    async def publish_paused(self, error: Paused) -> None:
        """Publish that a person paused it, and raise `error` to the callers that wait for it."""
        if not self.result.done():
            self.result.set_exception(error)
        await self.progress.publish_state(phase="paused", error=None, waiting_for="", blocked_since_s=0.0)

    async def cancel(self, running: asyncio.Task[None]) -> None:
        """Stop, delete the request and release the reservation. Idempotent.

        Raises if storage is down: the state then stays, so that the next attempt, or the next start, continues here.
        """
        await self.stop(running)
        error = Cancelled(f"the download of {self.ref} was cancelled")
        if not self.result.done():
            self.result.set_exception(error)
        await self._requests.end(str(self.ref), error)
        await self._release()
        await self._buckets.state.delete(self._key)

    async def _end(self, phase: DownloadPhase, error: ShoalError | None) -> None:
        body = error.body() if error else None
        await self.progress.publish_state(phase=phase, error=body, waiting_for="", blocked_since_s=0.0)
        # The request is done. If it were kept, a model lost later would be downloaded again unasked.
        await self._requests.end(str(self.ref), error or self.progress.state)
        if not self.result.done():
            if error is None:
                self.result.set_result(self.progress.state)
            else:
                self.result.set_exception(error)

    async def _emit_started(self, manifest: Manifest, files: list[ManifestFile], size_bytes: int | None) -> None:
        """Emit `download_started`, once, with the source that the largest missing file is to come from."""
        if self._has_started or not files:
            return
        self._has_started = True
        largest = max(files, key=lambda file: file.size_bytes)
        fields: dict[str, object] = {} if size_bytes is None else {"size_bytes": size_bytes}
        if source := self._blobs.expected_source(manifest, largest):
            fields["source"] = source
        await self._events.emit("download_started", model=str(self.ref), **fields)

    async def _emit_failure(self, error: ShoalError) -> None:
        if end_phase(error) == "rejected":
            figures = {
                name: value for name, value in error.details.items() if name.endswith("_bytes") and value is not None
            }
            await self._events.emit("download_rejected", model=str(self.ref), message=error.message, **figures)
        else:
            await self._events.emit("download_failed", model=str(self.ref), code=error.code, message=error.message)

    async def _emit_source_change(self, change: SourceChange) -> None:
        fields = {"from": change.before, "to": change.now}
        await self._events.emit("download_source_changed", model=str(self.ref), file=change.path, **fields)

    async def _release(self) -> None:
        """Release the reservation, unless another download of this node needs the same commit."""
        if not self._reserved_commit or self._wanted_elsewhere(self):
            return
        blobs = {*self._previous_blobs, *self.progress.state.blobs}
        try:
            await self._storage.release(self.ref.repo, self._reserved_commit, blobs)
        except ShoalError as e:
            log.warning("could not release a reservation", model=str(self.ref), reason=e.message)
            raise

    async def _download(self) -> None:
        await self.progress.publish_state(phase="queued", error=None, waiting_for="")
        manifest = await self._resolve()
        if self._reserved_commit not in ("", manifest.commit):
            log.info("revision moved to another commit", model=str(self.ref), commit=manifest.commit)
            await self._release()
        self._reserved_commit = manifest.commit
        lost_count, durable_bytes = 0, 0
        while True:
            try:
                return await self._reserve_and_fetch(manifest)
            except ReservationLost as e:
                # It expired, storage was restarted, or files were removed by hand: ask again what is present.
                lost_count = 1 if self.progress.done_bytes > durable_bytes else lost_count + 1
                durable_bytes = max(durable_bytes, self.progress.done_bytes)
                if lost_count == _MAX_RESERVE_ATTEMPTS:
                    raise
                log.warning("reservation lost, reserving again", model=str(self.ref), reason=e.message)
            except DiskFull as e:
                await self._disk_full_wait.wait_for_space(manifest.model, e)

    async def _resolve(self) -> Manifest:
        """Return the manifest: from this node (even if incomplete), another that has the model, or the hub."""
        for attempt in range(1, _MAX_RESOLVE_ATTEMPTS + 1):
            manifest = await self._own_manifest() or await self._peer_manifest()
            if manifest is not None:
                return manifest
            try:
                return await self._hub.resolve(self.ref)
            except HubUnavailable as e:
                if attempt == _MAX_RESOLVE_ATTEMPTS or self._hub.offline:
                    raise
                await self.progress.publish_state(waiting_for=e.message)
                await asyncio.sleep(e.retry_after_s if isinstance(e, RateLimited) else RETRY_BACKOFF.delay_s(attempt))
        raise AssertionError("the last attempt returns or raises")

    async def _peer_manifest(self) -> Manifest | None:
        for node, model in self._cluster_view.nodes_holding(self.ref):
            try:
                manifest = await self._rpc("storage", node, "manifest", GetManifest(model=model), Manifest)
            except ShoalError as e:
                log.info("a node did not return its manifest", peer=node, reason=e.message)
                continue
            if manifest.model == model and manifest.sealed:
                return structs.replace(manifest, revisions=[self.ref.revision])
            log.warning("a node returned the wrong manifest", peer=node, model=model)
        return None

    async def _own_manifest(self) -> Manifest | None:
        """Return this node's manifest of a commit, also of an incomplete model: repair needs no other node."""
        if not is_commit(self.ref.revision):
            return None  # only others know which commit a branch names now
        request = GetManifest(model=str(self.ref), include_incomplete=True)
        try:
            manifest = await self._rpc("storage", self._node, "manifest", request, Manifest)
        except ShoalError as e:
            log.debug("no manifest on this node", model=str(self.ref), reason=e.message)
            return None
        return manifest if manifest.commit == self.ref.revision else None

    async def _reserve_and_fetch(self, manifest: Manifest) -> None:
        if self.layers and await self._fetch_shard(manifest):
            return
        await self.progress.publish_state(
            phase="reserving",
            commit=manifest.commit,
            total_bytes=manifest.size_bytes,
            waiting_for="storage",
            error=None,
            layers=self.layers,
        )
        reserved = await self._storage.reserve(manifest)
        known = dict(reserved.sha256_by_git_name)
        present = set(reserved.present)
        missing: list[ManifestFile] = []
        self.progress.reset_counts()
        for blob, file in {f.blob: f for f in manifest.files}.items():
            sha256 = known.get(blob, blob)
            if sha256 in present:
                self.progress.set_blob_complete(blob, sha256, file.size_bytes)
            else:
                durable_bytes = await asyncio.to_thread(resumable_bytes, self._layout, blob, file.size_bytes)
                self.progress.set_durable_bytes(blob, durable_bytes)
                missing.append(file)
        changes = {} if self._resumed_published else {"resumed_bytes": self.progress.done_bytes}
        self._resumed_published = True
        await self.progress.publish_state(phase="fetching", waiting_for="", **changes)
        await self._emit_started(manifest, missing, manifest.size_bytes)
        await self._fetch_all(manifest, [(file, None) for file in missing], known)
        await self.progress.publish_state(phase="verifying", waiting_for="storage")
        await self._storage.seal(with_known_sha256(manifest, known))

    async def _fetch_shard(self, manifest: Manifest) -> bool:
        """Fetch the leaves that the layers need. Returns False if no leaf lists are available or the whole model is
        present: then all of it is fetched.
        """
        lists = await sealed_lists(manifest, self._cluster_view, self._leaf_lists)
        if lists is not None:
            await self.progress.publish_state(commit=manifest.commit, error=None)

            async def fetch(files: list[tuple[ManifestFile, int | None]]) -> None:
                await self._emit_started(manifest, [file for file, _ in files], None)
                await self._fetch_all(manifest, files, {})

            shard = ShardFetch(manifest, self.layers, lists, self._layout, self._storage, self.progress, fetch)
            if await shard.run():
                return True
        self.layers = []
        return False

    async def _fetch_all(
        self, manifest: Manifest, files: list[tuple[ManifestFile, int | None]], known: dict[str, str]
    ) -> None:
        slots = asyncio.Semaphore(_MAX_CONCURRENT_FILES)

        async def fetch(file: ManifestFile, wanted: int | None) -> None:
            async with slots:
                sha256 = await self._blobs.fetch(manifest, file, self.progress, wanted)
            if sha256 != file.blob:
                known[file.blob] = sha256

        try:
            async with asyncio.TaskGroup() as tasks:
                # Largest first: the last file to finish is then a small one.
                for file, wanted in sorted(files, key=lambda pair: -pair[0].size_bytes):
                    tasks.create_task(fetch(file, wanted))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first failure has cancelled the others


def _as_shoal_error(error: Exception, ref: ModelRef) -> ShoalError:
    """Return an error as a ShoalError; unexpected ones are logged with their traceback."""
    if isinstance(error, ShoalError):
        return error
    log.error("download failed unexpectedly", exc=error, model=str(ref))
    return InternalError(f"the download of {ref} failed: {type(error).__name__}: {error}; see the fetcher's log")
