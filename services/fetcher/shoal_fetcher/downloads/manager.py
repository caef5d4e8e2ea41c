"""The downloads of this node: starts, pauses, resumes, cancels them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx2

from shoal_common.bus.keys import download_key
from shoal_common.errors import Busy, Cancelled, Paused, ShoalError, Unavailable, from_body
from shoal_common.liveness.peer_failure import PeerFailureReporter
from shoal_common.logs import StructuredLogger
from shoal_common.messages import downloads
from shoal_common.messages.downloads import ENDED_PHASES, DownloadState, StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.messages.model_shape import GetModelShape, ModelSize
from shoal_common.models.layer_tensors import check_layers
from shoal_common.names import ModelRef
from shoal_common.service import ServiceContext
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads.blob_fetcher import BlobFetcher
from shoal_fetcher.downloads.request_store import DownloadRequests, merge_layers
from shoal_fetcher.downloads.task import DownloadTask
from shoal_fetcher.hub.client import HubClient, HubSettings
from shoal_fetcher.hub.model_info import ModelShapes
from shoal_fetcher.progress import Progress
from shoal_fetcher.rate_limits import RateLimits
from shoal_fetcher.storage_client import StorageClient
from shoal_fetcher.swarm.context import NodeFetchContext
from shoal_fetcher.swarm.http_client import PeerHttpClient
from shoal_fetcher.swarm.peer_client import FileserverClient

log = StructuredLogger("fetcher")
MAX_DOWNLOADS = 256
"""Running and paused together."""


class DownloadManager:
    """All downloads of this node."""

    def __init__(
        self,
        context: ServiceContext,
        tasks: asyncio.TaskGroup,
        cluster_view: ClusterView,
        requests: DownloadRequests,
        rate_limits: RateLimits,
        hub_http: httpx2.AsyncClient,
        peer_http: PeerHttpClient,
    ) -> None:
        self._context, self._tasks = context, tasks
        self._layout = StorePaths(context.config.store)
        self._hub = HubClient(HubSettings.read(context.environ), hub_http)
        self._cluster_view, self._requests = cluster_view, requests
        self._storage = StorageClient(context.rpc, context.node, cluster_view)
        node_context = NodeFetchContext(
            node=context.node,
            uid=context.liveness.uid,
            nats=context.nats,
            buckets=context.buckets,
            cluster_view=cluster_view,
            hub=self._hub,
            peers=FileserverClient(
                peer_http,
                context.config.secret,
                cluster_view.addresses,
                PeerFailureReporter(context.nats, context.node).report,
            ),
            read_counts=Counter(),
            rate_limits=rate_limits,
        )
        self._shapes = ModelShapes(self._hub, rate_limits.hub)
        self._blobs = BlobFetcher(node_context, self._layout, self._storage)
        self._leaf_lists = node_context.peers
        self._running: dict[str, tuple[DownloadTask, asyncio.Task[None]]] = {}
        self._changing = asyncio.Lock()

    async def resume_pending(self) -> None:
        """At startup: resume requests that are not paused, and finish cancellations that were interrupted."""
        states = self._cluster_view.own_downloads()
        for name in self._requests.names:
            request, state = self._requests.get(name), states.get(name)
            has_ended = state is not None and state.phase in ENDED_PHASES
            if request is None:
                continue
            if state is not None and has_ended and (request.paused or state.updated_at_s >= request.requested_at_s):
                # Killed after the download ended, before its request was deleted: a rejected download is not retried.
                await self._requests.end(name, from_body(state.error) if state.error else state)
            elif request.paused:
                if state is None or state.phase != "paused":
                    await self._publish_paused(name, state)
            else:
                log.info("resuming download", model=name)
                await self._start(ModelRef.parse(name))
        for name, state in states.items():
            if state is not None and state.phase not in ENDED_PHASES and self._requests.get(name) is None:
                log.info("finishing an interrupted cancellation", model=name)
                self._tasks.create_task(self._finish_cancellation(name))

    async def _finish_cancellation(self, name: str) -> None:
        async with self._changing:
            if self._requests.get(name) is None:
                with suppress(ShoalError):  # storage is down: the state stays for the next start
                    await self._stop_download(name)

    async def republish_after_wipes(self) -> None:
        """Republish requests and download states each time NATS has lost its store."""
        handled, store_wipes = 0, self._context.nats.store_wipes
        while True:
            count = await store_wipes.wait_after(handled)
            with suppress(Unavailable):  # NATS is down again: retried after the next wipe
                await self._republish()
                handled = count

    async def _republish(self) -> None:
        async with self._changing:
            await self._requests.republish()
            for name in self._requests.names:
                if name in self._running:
                    await self._running[name][0].progress.publish()
                elif self._requests.is_paused(name):
                    await self._publish_paused(name, None)

    async def download(self, command: downloads.DownloadCommand, identity: str) -> DownloadState:
        """Download a model, or some layers of it. Returns when it is ready; raises if the download fails."""
        ref = ModelRef.parse(command.model)
        layers = [list(check_layers(command.layers))] if command.layers else []
        name = str(ref)
        async with self._changing:
            if self._requests.get(name) is None and len(self._requests.names) >= MAX_DOWNLOADS:
                raise Busy(
                    f"{MAX_DOWNLOADS} downloads are running or paused on this node; wait for one, or cancel one"
                )
            if command.keep_paused and self._requests.is_paused(name):
                raise self._paused(name)
            stopped = await self._stop_if_insufficient(name, layers)
            try:
                await self._requests.request(name, identity, layers)
            except ShoalError:  # NATS is down, the request was not stored: the stopped download continues
                if stopped is not None:
                    await self._start(ref, stopped)
                raise
            download = await self._start(ref, stopped)
        return await asyncio.shield(download.result)

    async def _stop_if_insufficient(self, name: str, layers: list[list[int]]) -> DownloadTask | None:
        """Stop a download that fetches fewer layers than are requested now. Returns it, unless it ended by itself."""
        if name not in self._running:
            return None
        download, running = self._running[name]
        if merge_layers(download.layers, layers) == download.layers:
            return None
        return download if await download.stop(running) else None

    async def _start(self, ref: ModelRef, replaces: DownloadTask | None = None) -> DownloadTask:
        """Run the request for a model. `replaces` is a stopped download: the new task takes over its state and
        callers.
        """
        name = str(ref)
        if name in self._running:
            return self._running[name][0]
        before = replaces.progress.state if replaces else await self._state_of(name)
        request = self._requests.get(name)
        download = DownloadTask(
            ref=ref,
            node=self._context.node,
            layout=self._layout,
            buckets=self._context.buckets,
            rpc=self._context.rpc,
            events=self._context.events,
            storage=self._storage,
            hub=self._hub,
            cluster_view=self._cluster_view,
            blobs=self._blobs,
            requests=self._requests,
            leaf_lists=self._leaf_lists,
            layers=request.layers if request else [],
            previous_state=before,
            result=replaces.result if replaces else None,
            is_needed_elsewhere=lambda d: self._is_wanted(d.ref.repo, d.commit, except_name=name),
        )
        running = self._tasks.create_task(download.run())
        self._running[name] = (download, running)
        running.add_done_callback(lambda _: self._running.pop(name, None))
        return download

    def _is_wanted(self, repo: str, commit: str, except_name: str) -> bool:
        """Return whether another request is for this commit: `main` and a tag may be the same bytes."""
        commits = {
            name: state.commit for name, state in self._cluster_view.own_downloads().items() if state is not None
        }
        commits |= {name: download.commit for name, (download, _) in self._running.items()}
        others = (name for name in self._requests.names if name != except_name)
        return any((ModelRef.parse(name).repo, commits.get(name)) == (repo, commit) for name in others)

    async def pause(self, command: downloads.PauseDownload, _: str) -> dict[str, object]:
        """Stop downloads and keep their bytes. Returns the resulting phase of each; never an error (I5)."""
        return await self._change_each(command.model, self._pause)

    async def resume(self, command: downloads.ResumeDownload, _: str) -> dict[str, object]:
        """Resume paused downloads. Returns the resulting phase of each; never an error (I5)."""
        return await self._change_each(command.model, self._resume)

    async def _change_each(self, model: str, change: Callable[[str], Awaitable[str]]) -> dict[str, object]:
        names = [str(ModelRef.parse(model))] if model else None
        async with self._changing:
            return {"models": {name: await change(name) for name in names or self._requests.names}}

    async def _pause(self, name: str) -> str:
        if name in self._running:
            download, running = self._running[name]
            if not await download.stop(running):
                return download.progress.state.phase
            try:
                await self._requests.pause(name, self._paused(name))
            except ShoalError:  # NATS is down: the pause was not stored and would not survive a restart, so undo it
                await self._start(ModelRef.parse(name), download)
                raise
            await download.publish_paused(self._paused(name))
            await self._context.events.emit("download_paused", model=name)
        elif self._requests.get(name) is None:
            return await self._phase_of(name)
        elif self._requests.is_paused(name):
            return "was_paused"
        log.info("download paused", model=name)
        return "paused"

    async def _resume(self, name: str) -> str:
        if self._requests.get(name) is None:
            return await self._phase_of(name)
        if not self._requests.is_paused(name):
            return "under_way"
        await self._requests.resume(name)
        await self._start(ModelRef.parse(name))
        log.info("download resumed", model=name)
        return "resumed"

    def _paused(self, name: str) -> Paused:
        return Paused(
            f"the download of {name} is paused on node {self._context.node}; `shoal resume {name}` continues it"
        )

    async def _publish_paused(self, name: str, state: DownloadState | None) -> None:
        """Publish `paused` for a download that is not running, after a crash or after NATS lost its state."""
        state = state or DownloadState(node=self._context.node, model=name, phase="queued")
        await Progress(self._context.buckets.state, state).publish_state(phase="paused", waiting_for="", error=None)

    async def _phase_of(self, name: str) -> str:
        state = await self._state_of(name)
        return state.phase if state else "unknown"

    async def cancel(self, command: downloads.CancelDownload, _: str) -> dict[str, object]:
        """Cancel a download, or discard what a failed one left. Cancelling an unknown one is no error (I5)."""
        name = str(ModelRef.parse(command.model))
        async with self._changing:
            previous_phase = await self._phase_of(name)
            if self._requests.get(name) is None and previous_phase in ("unknown", "ready"):
                return {"cancelled": False, "was": previous_phase}
            await self._stop_download(name)
        return {"cancelled": True, "was": previous_phase}

    async def stop_downloads(self, request: StopDownloads) -> Empty:
        """Stop and forget all downloads of a model that storage is about to delete."""
        async with self._changing:
            states = self._cluster_view.own_downloads()
            commits = {name: state.commit for name, state in states.items() if state is not None}
            commits |= {name: download.commit for name, (download, _) in self._running.items()}
            for name in {*states, *self._requests.names, *self._running}:
                ref = ModelRef.parse(name)
                if ref.repo == request.repo and request.revision in ("", ref.revision, commits.get(name)):
                    await self._stop_download(name)
        return Empty()

    async def shape(self, request: GetModelShape) -> ModelSize:
        """Return the size of each layer of a model that may be on no node."""
        return await self._shapes.size_of(ModelRef.parse(request.model))

    async def _stop_download(self, name: str) -> None:
        if name in self._running:
            download, running = self._running[name]
            await download.cancel(running)
        else:
            state = await self._state_of(name)
            await self._requests.end(name, Cancelled(f"the download of {name} was cancelled"))
            if state is not None and state.commit:
                repo = ModelRef.parse(name).repo
                if not self._is_wanted(repo, state.commit, except_name=name):
                    await self._storage.release(repo, state.commit, state.blobs)
            await self._context.buckets.state.delete(download_key(self._context.node, name))
        log.info("download cancelled", model=name)

    async def _state_of(self, name: str) -> DownloadState | None:
        return await self._context.buckets.state.get_as(download_key(self._context.node, name), DownloadState)

    def stop(self) -> None:
        """Stop all downloads at shutdown; they resume at the next start."""
        for _, running in self._running.values():
            running.cancel()
