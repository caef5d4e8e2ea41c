"""The shell: wishes in `spec` become running downloads; commands add and withdraw wishes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress

import httpx2

from shoal_common.buckets import download_key
from shoal_common.commands import Verb
from shoal_common.errors import Busy, ShoalError
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.messages import commands
from shoal_common.messages.questions import Done, Withdraw
from shoal_common.messages.records import ENDED, DownloadSpec, DownloadState
from shoal_common.names import ModelRef
from shoal_common.pace import Pace
from shoal_common.questions import Question
from shoal_common.service import Context
from shoal_fetcher.blobs import BlobFetcher
from shoal_fetcher.download import Download
from shoal_fetcher.http_range import hub_client
from shoal_fetcher.hub import Hub, HubSettings
from shoal_fetcher.storage import Storage
from shoal_fetcher.surroundings import Surroundings
from shoal_fetcher.swarm.peers import Peers
from shoal_fetcher.swarm.receive import PeerClient
from shoal_fetcher.swarm.shared import Shared

log = Log("fetcher")

_DOWNLOAD_DEADLINE_S = 24 * 3600.0
_CANCEL_DEADLINE_S = 60.0
MAX_DOWNLOADS = 256


class Fetcher:
    """All downloads of this node."""

    def __init__(
        self,
        context: Context,
        tasks: asyncio.TaskGroup,
        around: Surroundings,
        from_hub: httpx2.AsyncClient,
        from_peers: PeerClient,
    ) -> None:
        self._context, self._tasks = context, tasks
        self._layout = Layout(context.config.store)
        self._hub = Hub(HubSettings.read(context.environ), from_hub)
        self._around = around
        self._storage = Storage(context.ask, context.node, around)
        self._peers = Peers(from_peers, context.config.secret, around.addresses)
        self._hub_pace = Pace()
        shared = Shared(
            node=context.node,
            uid=context.liveness.uid,
            nats=context.nats,
            buckets=context.buckets,
            around=around,
            hub=self._hub,
            hub_pace=self._hub_pace,
            peers=self._peers,
            busy=Counter(),
        )
        self._blobs = BlobFetcher(shared, self._layout, self._storage)
        self._running: dict[str, tuple[Download, asyncio.Task[None]]] = {}
        self._changing = asyncio.Lock()

    async def resume(self) -> None:
        """At start: go on with what people asked for before, and with what they had begun to withdraw."""
        for name, state in self._around.own_downloads().items():
            if self._around.wished(name):
                log.info("resuming", model=name)
                await self._start(ModelRef.parse(name))
            elif state is not None and state.phase not in ENDED:
                log.info("withdrawing what was left", model=name)
                self._tasks.create_task(self._finish_withdrawal(name))

    async def _finish_withdrawal(self, name: str) -> None:
        async with self._changing:
            if name not in self._running:
                with suppress(ShoalError):  # storage is away: the state stays, for the next start
                    await self._withdraw(name)

    async def download(self, command: commands.Download, _: str) -> DownloadState:
        """Bring a model to this node; ends when it is ready, or raises why it is not to be."""
        ref = ModelRef.parse(command.model)
        async with self._changing:
            spec = self._context.buckets.spec
            if len(self._running) >= MAX_DOWNLOADS and str(ref) not in self._running:
                raise Busy(f"{MAX_DOWNLOADS} downloads are under way on this node; wait for one to end")
            if str(ref) not in self._running:
                wish = DownloadSpec(model=str(ref), asked_at_s=round(time.time(), 3))
                await spec.put(download_key(self._context.node, str(ref)), wish)
            download = await self._start(ref)
        return await asyncio.shield(download.ended)

    async def _start(self, ref: ModelRef) -> Download:
        name = str(ref)
        if name in self._running:
            return self._running[name][0]
        before = await self._state_of(name)
        download = Download(
            ref=ref,
            node=self._context.node,
            layout=self._layout,
            buckets=self._context.buckets,
            ask=self._context.ask,
            storage=self._storage,
            hub=self._hub,
            around=self._around,
            blobs=self._blobs,
            before=before,
            wanted_elsewhere=lambda d: self._is_fetching(d.ref.repo, d.commit, but=d),
        )
        running = self._tasks.create_task(download.run())
        self._running[name] = (download, running)
        running.add_done_callback(lambda _: self._running.pop(name, None))
        return download

    def _is_fetching(self, repo: str, commit: str, but: Download | None = None) -> bool:
        """Whether a download brings this commit: `main` and a tag may be two downloads of the same bytes."""
        return any(d is not but and (d.ref.repo, d.commit) == (repo, commit) for d, _ in self._running.values())

    async def cancel(self, command: commands.CancelDownload, _: str) -> dict[str, object]:
        """Withdraw one download, or what a failed one has left. One that is not under way is no error (I5)."""
        name = str(ModelRef.parse(command.model))
        async with self._changing:
            state = await self._state_of(name)
            if name not in self._running and (state is None or state.phase == "ready"):
                return {"cancelled": False}
            await self._withdraw(name)
        return {"cancelled": True}

    async def withdraw(self, question: Withdraw) -> Done:
        """Storage is about to delete: no wish, no running download and no state of the model may remain."""
        async with self._changing:
            commits = {name: d.commit for name, d in self._around.own_downloads().items() if d is not None}
            commits |= {name: download.commit for name, (download, _) in self._running.items()}
            for name in {*self._around.own_downloads(), *self._running}:
                ref = ModelRef.parse(name)
                if ref.repo == question.repo and question.revision in ("", ref.revision, commits.get(name)):
                    await self._withdraw(name)
        return Done()

    async def _withdraw(self, name: str) -> None:
        key = download_key(self._context.node, name)
        if name in self._running:
            download, running = self._running[name]
            await download.withdraw(running)
        else:
            state = await self._state_of(name)
            await self._context.buckets.spec.delete(key)
            if state is not None and state.commit:
                repo = ModelRef.parse(name).repo
                if not self._is_fetching(repo, state.commit):
                    await self._storage.release(repo, state.commit, state.blobs)
            await self._context.buckets.state.delete(key)
        log.info("withdrawn", model=name)

    async def _state_of(self, name: str) -> DownloadState | None:
        return await self._context.buckets.state.get_as(download_key(self._context.node, name), DownloadState)

    def stop(self) -> None:
        """The service stops: downloads pause as they are and go on at the next start."""
        for _, running in self._running.values():
            running.cancel()


async def run(context: Context) -> None:
    """The fetcher service."""
    async with hub_client() as from_hub, PeerClient() as from_peers, asyncio.TaskGroup() as tasks:
        live = await context.view(tasks, "live")
        state = await context.view(tasks, "state")
        lease = await context.view(tasks, "lease")
        spec = await context.view(tasks, "spec", f"download.{context.node}.>")
        around = Surroundings(context.nats, context.node, live, state, lease, spec)
        fetcher = Fetcher(context, tasks, around, from_hub, from_peers)
        await fetcher.resume()
        tasks.create_task(context.serve({"withdraw": Question(Withdraw, fetcher.withdraw)}))
        tasks.create_task(
            context.work(
                {
                    "download": Verb(commands.Download, fetcher.download, _DOWNLOAD_DEADLINE_S),
                    "cancel": Verb(commands.CancelDownload, fetcher.cancel, _CANCEL_DEADLINE_S),
                }
            )
        )
        context.ready()
        await context.stopping.wait()
        fetcher.stop()
