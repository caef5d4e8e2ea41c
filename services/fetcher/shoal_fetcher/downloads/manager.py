"""The downloads of this node, a task for each: what they find at the start, and whom a command is for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from shoal_common.logs import StructuredLogger
from shoal_common.messages import downloads
from shoal_common.messages.downloads import ENDED_PHASES, DownloadState, StopDownloads
from shoal_common.messages.envelope import Empty
from shoal_common.models.layer_tensors import check_layers
from shoal_common.names import ModelRef
from shoal_fetcher.downloads import events as ev
from shoal_fetcher.downloads.model_fetch import DownloadContext
from shoal_fetcher.downloads.task import CommandReply, DownloadTask

log = StructuredLogger("fetcher")

_MAX_CONCURRENT_COMMANDS = 32
"""Downloads that one command changes at the same time."""


class DownloadManager:
    """All downloads of this node. A command waits for earlier ones of the same model, and for no other."""

    def __init__(self, context: DownloadContext, tasks: asyncio.TaskGroup) -> None:
        self._context, self._tasks = context, tasks
        self._downloads: dict[str, tuple[DownloadTask, asyncio.Task[None]]] = {}

    async def resume_pending(self) -> None:
        """At startup: resume requests that are not paused, and finish cancellations that were interrupted."""
        states, requests = self._context.cluster_view.own_downloads(), self._context.requests
        for name, state in states.items():
            if state is not None and state.phase not in ENDED_PHASES and requests.get(name) is None:
                log.info("finishing an interrupted cancellation", model=name)
                self._start(name, ev.Found(None, state))
        requested = [self._start(name, ev.Found(requests.get(name), states.get(name))) for name in requests.names]
        for download in requested:
            await download.started.wait()

    async def republish(self) -> None:
        """Publish requests and download states again, which NATS has lost."""
        await self._send_each(list(self._downloads), ev.StoreWiped())

    async def download(self, command: downloads.DownloadCommand, identity: str) -> DownloadState:
        """Download a model, or some layers of it. Returns when it is ready; raises if the download fails."""
        layers = [list(check_layers(command.layers))] if command.layers else []
        name = str(ModelRef.parse(command.model))
        reply = await self._send(name, ev.DownloadRequested(identity, layers, command.keep_paused, command.force))
        return await asyncio.shield(reply.result)

    async def pause(self, command: downloads.PauseDownload, _: str) -> dict[str, object]:
        """Stop downloads and keep their bytes. Returns the resulting phase of each; no phase is an error (I5)."""
        return await self._change(command.model, ev.PauseRequested())

    async def resume(self, command: downloads.ResumeDownload, _: str) -> dict[str, object]:
        """Resume paused downloads. Returns the resulting phase of each; no phase is an error (I5)."""
        return await self._change(command.model, ev.ResumeRequested())

    async def _change(self, model: str, event: ev.DownloadEvent) -> dict[str, object]:
        names = [str(ModelRef.parse(model))] if model else self._context.requests.names
        replies = await self._send_each(names, event)
        return {"models": {name: reply.text for name, reply in zip(names, replies, strict=True)}}

    async def cancel(self, command: downloads.CancelDownload, _: str) -> dict[str, object]:
        """Cancel a download, or discard what a failed one left. Cancelling an unknown one is no error (I5)."""
        reply = await self._send(str(ModelRef.parse(command.model)), ev.CancelRequested())
        return {"cancelled": reply.text == "cancelled", "was": reply.was}

    async def stop_downloads(self, request: StopDownloads) -> Empty:
        """Stop and forget all downloads of a model that storage is about to delete."""
        commits = self._commits()
        names = []
        for name in {*commits, *self._context.requests.names}:
            ref = ModelRef.parse(name)
            if ref.repo == request.repo and request.revision in ("", ref.revision, commits.get(name)):
                names.append(name)
        await self._send_each(names, ev.CancelRequested(deletes_model=True))
        return Empty()

    async def _send_each(self, names: Iterable[str], event: ev.DownloadEvent) -> list[CommandReply]:
        """Have all these downloads handle a command, each however the others fare. Raises the first failure."""
        slots = asyncio.Semaphore(_MAX_CONCURRENT_COMMANDS)

        async def send(name: str) -> CommandReply:
            async with slots:
                return await self._send(name, event)

        replies = await asyncio.gather(*(send(name) for name in names), return_exceptions=True)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return [reply for reply in replies if isinstance(reply, CommandReply)]

    async def _send(self, name: str, event: ev.DownloadEvent) -> CommandReply:
        running = self._downloads.get(name)
        download = running[0] if running else self._start(name, None)
        return await download.send(event)

    def _start(self, name: str, found: ev.Found | None) -> DownloadTask:
        ref = ModelRef.parse(name)

        def is_needed_elsewhere(commit: str) -> bool:
            return self._is_requested(ref.repo, commit, except_name=name)

        download = DownloadTask(ref, self._context, found, is_needed_elsewhere, lambda: self._forget(name, download))
        self._downloads[name] = download, self._tasks.create_task(download.run())
        return download

    def _forget(self, name: str, download: DownloadTask) -> None:
        running = self._downloads.get(name)
        if running is not None and running[0] is download:
            del self._downloads[name]

    def _commits(self) -> dict[str, str]:
        states = self._context.cluster_view.own_downloads()
        commits = {name: state.commit for name, state in states.items() if state is not None}
        return commits | {name: download.commit for name, (download, _) in self._downloads.items()}

    def _is_requested(self, repo: str, commit: str, except_name: str) -> bool:
        """Return whether another request is for this commit: `main` and a tag may be the same bytes."""
        commits = self._commits()
        others = (name for name in self._context.requests.names if name != except_name)
        return any((ModelRef.parse(name).repo, commits.get(name)) == (repo, commit) for name in others)

    def stop(self) -> None:
        """Stop all downloads at shutdown; they resume at the next start."""
        for _, running in self._downloads.values():
            running.cancel()
