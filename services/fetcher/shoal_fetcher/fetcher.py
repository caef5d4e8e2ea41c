"""The shell: wishes in `spec` become running downloads; commands add and withdraw wishes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import httpx2

from shoal_common.buckets import download_key
from shoal_common.commands import Verb
from shoal_common.errors import Busy, Paused, ShoalError, Unavailable, Withdrawn, from_body
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.messages import commands
from shoal_common.messages.questions import AskShape, Done, ModelSize, Withdraw
from shoal_common.messages.records import ENDED, DownloadSpec, DownloadState
from shoal_common.names import ModelRef
from shoal_common.questions import Question
from shoal_common.service import Context
from shoal_common.sight import Sight
from shoal_common.tensors import check_layers
from shoal_fetcher.blobs import BlobFetcher
from shoal_fetcher.download import Download
from shoal_fetcher.http_range import hub_client
from shoal_fetcher.hub import Hub, HubSettings
from shoal_fetcher.limits import Limits
from shoal_fetcher.progress import Progress
from shoal_fetcher.shapes import Shapes
from shoal_fetcher.storage import Storage
from shoal_fetcher.surroundings import Surroundings
from shoal_fetcher.swarm.peers import Peers
from shoal_fetcher.swarm.receive import PeerClient
from shoal_fetcher.swarm.shared import Shared
from shoal_fetcher.wishes import Wishes, joined

log = Log("fetcher")

_DOWNLOAD_DEADLINE_S = 24 * 3600.0
_CONTROL_DEADLINE_S = 60.0
MAX_DOWNLOADS = 256
"""Under way and paused together."""


class Fetcher:
    """All downloads of this node."""

    def __init__(
        self,
        context: Context,
        tasks: asyncio.TaskGroup,
        around: Surroundings,
        wishes: Wishes,
        limits: Limits,
        from_hub: httpx2.AsyncClient,
        from_peers: PeerClient,
    ) -> None:
        self._context, self._tasks = context, tasks
        self._layout = Layout(context.config.store)
        self._hub = Hub(HubSettings.read(context.environ), from_hub)
        self._around, self._wishes = around, wishes
        self._storage = Storage(context.ask, context.node, around)
        shared = Shared(
            node=context.node,
            uid=context.liveness.uid,
            nats=context.nats,
            buckets=context.buckets,
            around=around,
            hub=self._hub,
            peers=Peers(from_peers, context.config.secret, around.addresses, Sight(context.nats, context.node).lost),
            busy=Counter(),
            limits=limits,
        )
        self._shapes = Shapes(self._hub, limits.hub)
        self._blobs = BlobFetcher(shared, self._layout, self._storage)
        self._leaf_lists = shared.peers
        self._running: dict[str, tuple[Download, asyncio.Task[None]]] = {}
        self._changing = asyncio.Lock()

    async def take_up(self) -> None:
        """At start: go on with what people asked for before and have not paused, and finish what had begun to end."""
        states = self._around.own_downloads()
        for name in self._wishes.names:
            wish, state = self._wishes.get(name), states.get(name)
            has_ended = state is not None and state.phase in ENDED
            if wish is None:
                continue
            if state is not None and has_ended and (wish.paused or state.updated_at_s >= wish.asked_at_s):
                # Killed between its end and the end of its wish: what was rejected is not tried again by that.
                await self._wishes.end(name, from_body(state.error) if state.error else state)
            elif wish.paused:
                if state is None or state.phase != "paused":
                    await self._say_paused(name, state)
            else:
                log.info("going on", model=name)
                await self._start(ModelRef.parse(name))
        for name, state in states.items():
            if state is not None and state.phase not in ENDED and self._wishes.get(name) is None:
                log.info("withdrawing what was left", model=name)
                self._tasks.create_task(self._finish_withdrawal(name))

    async def _finish_withdrawal(self, name: str) -> None:
        async with self._changing:
            if self._wishes.get(name) is None:
                with suppress(ShoalError):  # storage is away: the state stays, for the next start
                    await self._withdraw(name)

    async def say_again_after_wipes(self) -> None:
        """A NATS that has lost its store has lost what people want of this node, and how it stands."""
        seen, wipes = 0, self._context.nats.wipes
        while True:
            count = await wipes.wait_after(seen)
            with suppress(Unavailable):  # away again already: once more, then
                await self._say_again()
                seen = count

    async def _say_again(self) -> None:
        async with self._changing:
            await self._wishes.say_again()
            for name in self._wishes.names:
                if name in self._running:
                    await self._running[name][0].progress.publish()
                elif self._wishes.is_paused(name):
                    await self._say_paused(name, None)

    async def download(self, command: commands.Download, identity: str) -> DownloadState:
        """Bring a model, or some layers of it, to this node; ends when it is ready, or raises why it is not to be."""
        ref = ModelRef.parse(command.model)
        layers = [list(check_layers(command.layers))] if command.layers else []
        name = str(ref)
        async with self._changing:
            if self._wishes.get(name) is None and len(self._wishes.names) >= MAX_DOWNLOADS:
                raise Busy(f"{MAX_DOWNLOADS} downloads are under way or paused on this node; wait for one to end")
            if command.unless_paused and self._wishes.is_paused(name):
                raise self._paused(name)
            narrower = await self._stop_narrower(name, layers)
            try:
                await self._wishes.ask(name, identity, layers)
            except ShoalError:  # NATS is away: what is not kept is not done, and the other goes on as it was
                if narrower is not None:
                    await self._start(ref, narrower)
                raise
            download = await self._start(ref, narrower)
        return await asyncio.shield(download.ended)

    async def _stop_narrower(self, name: str, layers: list[list[int]]) -> Download | None:
        """Stop a download that brings less than is wanted now. Returns it, unless it has ended by itself."""
        if name not in self._running:
            return None
        download, running = self._running[name]
        if joined(download.layers, layers) == download.layers:
            return None
        return download if await download.stop(running) else None

    async def _start(self, ref: ModelRef, instead_of: Download | None = None) -> Download:
        """Fetch what the wish says. `instead_of` was stopped: this one goes on for it, and for who waits for it."""
        name = str(ref)
        if name in self._running:
            return self._running[name][0]
        before = instead_of.progress.state if instead_of else await self._state_of(name)
        wish = self._wishes.get(name)
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
            wishes=self._wishes,
            leaf_lists=self._leaf_lists,
            layers=wish.layers if wish else [],
            before=before,
            ended=instead_of.ended if instead_of else None,
            wanted_elsewhere=lambda d: self._is_wanted(d.ref.repo, d.commit, but=name),
        )
        running = self._tasks.create_task(download.run())
        self._running[name] = (download, running)
        running.add_done_callback(lambda _: self._running.pop(name, None))
        return download

    def _is_wanted(self, repo: str, commit: str, but: str) -> bool:
        """Whether another wish is for this commit: `main` and a tag may be two downloads of the same bytes."""
        commits = {name: state.commit for name, state in self._around.own_downloads().items() if state is not None}
        commits |= {name: download.commit for name, (download, _) in self._running.items()}
        others = (name for name in self._wishes.names if name != but)
        return any((ModelRef.parse(name).repo, commits.get(name)) == (repo, commit) for name in others)

    async def pause(self, command: commands.PauseDownload, _: str) -> dict[str, object]:
        """Stop downloads and keep their bytes. Says of each what it is now; nothing is an error (I5)."""
        return await self._each(command.model, self._pause)

    async def resume(self, command: commands.ResumeDownload, _: str) -> dict[str, object]:
        """Let paused downloads go on. Says of each what it is now; nothing is an error (I5)."""
        return await self._each(command.model, self._resume)

    async def _each(self, model: str, change: Callable[[str], Awaitable[str]]) -> dict[str, object]:
        names = [str(ModelRef.parse(model))] if model else None
        async with self._changing:
            return {"models": {name: await change(name) for name in names or self._wishes.names}}

    async def _pause(self, name: str) -> str:
        if name in self._running:
            download, running = self._running[name]
            if not await download.stop(running):
                return download.progress.state.phase
            try:
                await self._wishes.pause(name, self._paused(name))
            except ShoalError:  # NATS is away: what is not kept would not outlive us, and is not done
                await self._start(ModelRef.parse(name), download)
                raise
            await download.say_paused(self._paused(name))
        elif self._wishes.get(name) is None:
            return await self._phase_of(name)
        elif self._wishes.is_paused(name):
            return "was_paused"
        log.info("paused", model=name)
        return "paused"

    async def _resume(self, name: str) -> str:
        if self._wishes.get(name) is None:
            return await self._phase_of(name)
        if not self._wishes.is_paused(name):
            return "under_way"
        await self._wishes.go_on(name)
        await self._start(ModelRef.parse(name))
        log.info("resumed", model=name)
        return "resumed"

    def _paused(self, name: str) -> Paused:
        return Paused(
            f"the download of {name} is paused on node {self._context.node}: `shoal resume {name}` lets it go on"
        )

    async def _say_paused(self, name: str, state: DownloadState | None) -> None:
        """Of a download that is not running: its process was killed, or what was said of it is lost."""
        state = state or DownloadState(node=self._context.node, model=name, phase="queued")
        await Progress(self._context.buckets.state, state).say(phase="paused", waiting_for="", error=None)

    async def _phase_of(self, name: str) -> str:
        state = await self._state_of(name)
        return state.phase if state else "unknown"

    async def cancel(self, command: commands.CancelDownload, _: str) -> dict[str, object]:
        """Withdraw one download, or what a failed one has left. One that is not under way is no error (I5)."""
        name = str(ModelRef.parse(command.model))
        async with self._changing:
            was = await self._phase_of(name)
            if self._wishes.get(name) is None and was in ("unknown", "ready"):
                return {"cancelled": False, "was": was}
            await self._withdraw(name)
        return {"cancelled": True, "was": was}

    async def withdraw(self, question: Withdraw) -> Done:
        """Storage is about to delete: no wish, no running download and no state of the model may remain."""
        async with self._changing:
            states = self._around.own_downloads()
            commits = {name: state.commit for name, state in states.items() if state is not None}
            commits |= {name: download.commit for name, (download, _) in self._running.items()}
            for name in {*states, *self._wishes.names, *self._running}:
                ref = ModelRef.parse(name)
                if ref.repo == question.repo and question.revision in ("", ref.revision, commits.get(name)):
                    await self._withdraw(name)
        return Done()

    async def shape(self, question: AskShape) -> ModelSize:
        """What a model's layers take, before anybody pulls it."""
        return await self._shapes.of(ModelRef.parse(question.model))

    async def _withdraw(self, name: str) -> None:
        if name in self._running:
            download, running = self._running[name]
            await download.withdraw(running)
        else:
            state = await self._state_of(name)
            await self._wishes.end(name, Withdrawn(f"the download of {name} was withdrawn"))
            if state is not None and state.commit:
                repo = ModelRef.parse(name).repo
                if not self._is_wanted(repo, state.commit, but=name):
                    await self._storage.release(repo, state.commit, state.blobs)
            await self._context.buckets.state.delete(download_key(self._context.node, name))
        log.info("withdrawn", model=name)

    async def _state_of(self, name: str) -> DownloadState | None:
        return await self._context.buckets.state.get_as(download_key(self._context.node, name), DownloadState)

    def stop(self) -> None:
        """The service stops: downloads stop as they are and go on at the next start."""
        for _, running in self._running.values():
            running.cancel()


async def run(context: Context) -> None:
    """The fetcher service."""
    async with hub_client() as from_hub, PeerClient() as from_peers, asyncio.TaskGroup() as tasks:
        live = await context.view(tasks, "live", "*.fileserver", "*.storage")
        state = await context.view(tasks, "state")
        lease = await context.view(tasks, "lease")
        spec = await context.view(tasks, "spec", f"download.{context.node}.>")
        await context.follow_interfaces()
        around = Surroundings(context.nats, context.node, live, state, lease, spec, context.interfaces)
        wishes = Wishes(context.buckets, context.node, [wish for _, wish in spec.items("", DownloadSpec)])
        limits = Limits()
        context.background(tasks, limits.follow(state, context.node))
        fetcher = Fetcher(context, tasks, around, wishes, limits, from_hub, from_peers)
        await fetcher.take_up()
        context.background(tasks, fetcher.say_again_after_wipes())
        questions = {"withdraw": Question(Withdraw, fetcher.withdraw), "shape": Question(AskShape, fetcher.shape)}
        tasks.create_task(context.serve(questions))
        tasks.create_task(
            context.work(
                {
                    "download": Verb(commands.Download, fetcher.download, _DOWNLOAD_DEADLINE_S),
                    "pause": Verb(commands.PauseDownload, fetcher.pause, _CONTROL_DEADLINE_S),
                    "resume": Verb(commands.ResumeDownload, fetcher.resume, _CONTROL_DEADLINE_S),
                    "cancel": Verb(commands.CancelDownload, fetcher.cancel, _CONTROL_DEADLINE_S),
                }
            )
        )
        context.ready()
        await context.stopping.wait()
        fetcher.stop()
