"""Runs one download: does what its state machine decides, and feeds it what becomes of that.

Commands wait in a queue and are handled one after another, each to its end, whatever becomes of who sent it.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress

import msgspec
from opentelemetry.trace import Span

from shoal_common import telemetry
from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import download_key
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.errors import Busy, Cancelled, InternalError, ShoalError, from_body
from shoal_common.logs import StructuredLogger
from shoal_common.messages.downloads import DownloadState
from shoal_common.names import ModelRef
from shoal_fetcher.downloads import events as ev
from shoal_fetcher.downloads.model_fetch import DownloadContext
from shoal_fetcher.downloads.state_machine import Download, handle, new_state, with_decisions
from shoal_fetcher.downloads.steps import DownloadSteps, as_shoal_error
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.source_changes import SourceChange

log = StructuredLogger("download")

_STOP_DEADLINE_S = 60.0
"""Work that is stopped makes durable what has arrived."""
MAX_QUEUED_COMMANDS = 512
"""For one model: as many as the service handles at a time."""


class CommandReply(msgspec.Struct, frozen=True):
    """What became of a command."""

    text: str
    was: str
    """The phase that was published before it; `unknown` if none."""
    result: asyncio.Future[DownloadState]
    """Resolves when the download has ended; raises why it failed, was paused or was cancelled."""


class _Command(msgspec.Struct):
    event: ev.DownloadEvent
    reply: asyncio.Future[CommandReply]
    trace: contextvars.Context
    """Where the command's span is the current one."""
    was: str = ""


class DownloadTask:
    """One model being downloaded to this node, from its first command to its end. `run` it as a task.

    `found`: what is known of it; None: read the state from NATS. It has no request then.
    """

    def __init__(
        self,
        ref: ModelRef,
        context: DownloadContext,
        found: ev.Found | None,
        is_needed_elsewhere: Callable[[str], bool],
        on_end: Callable[[], None],
    ) -> None:
        self.ref, self._name, self._context, self._found = ref, str(ref), context, found
        self._is_needed_elsewhere, self._on_end = is_needed_elsewhere, on_end
        self.started = asyncio.Event()
        """Set once it does what it was found to have to do."""
        self._state = Download(node=context.node, model=self._name)
        self._commands: deque[_Command] = deque()
        self._command: _Command | None = None
        self._wakeup = asyncio.Event()
        self._work: asyncio.Task[ev.DownloadEvent] | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._begun_at_s = time.monotonic()
        self._trace, self._trace_context = ExitStack(), contextvars.copy_context()
        self._span: Span | None = None
        self._result = _new_result()
        self._set_up(None)

    def _set_up(self, state: DownloadState | None) -> None:
        shown = state or new_state(self._context.node, self._name, cluster_clock.now_s())
        self._progress = Progress(self._context.buckets.state, shown, self, is_published=state is not None)
        self._steps = self._new_steps()

    def _new_steps(self) -> DownloadSteps:
        return DownloadSteps(self.ref, self._state.layers, self._context, self._progress, self._is_needed_elsewhere)

    @property
    def commit(self) -> str:
        """The commit being fetched; "" until it is known."""
        return self._progress.state.commit

    async def send(self, command: ev.DownloadEvent) -> CommandReply:
        """Have a command handled. Returns what became of it; raises what refused it. A caller may give up waiting."""
        if len(self._commands) >= MAX_QUEUED_COMMANDS:
            raise Busy(f"{MAX_QUEUED_COMMANDS} commands for {self._name} are waiting; try again later")
        reply: asyncio.Future[CommandReply] = asyncio.get_running_loop().create_future()
        self._commands.append(_Command(command, reply, contextvars.copy_context()))
        self._wakeup.set()
        return await reply

    async def run(self) -> None:
        """Run the download until there is nothing to do and no command waits."""
        try:
            found = await self._find()
            if found is None:
                return
            self._set_up(found.state)
            await self._handle(found)
            self.started.set()
            while (event := self._next_event()) is not None or not self._is_over:
                if event is not None:
                    await self._handle(event)
                    self._command = None
                else:
                    self._wakeup.clear()
                    await self._wakeup.wait()
        finally:
            self._on_end()
            await self._stop_work()
            await self._stop_publishing()

    async def _find(self) -> ev.Found | None:
        if self._found is not None:
            return self._found
        try:
            return ev.Found(None, await self._context.buckets.state.get_as(self._key, DownloadState))
        except ShoalError as e:
            # NATS is down, and nothing of the download runs.
            for command in self._commands:
                _refuse(command, e)
            return None

    @property
    def _key(self) -> str:
        return download_key(self._context.node, self._name)

    @property
    def _is_over(self) -> bool:
        return self._state.doing is None and self._state.phase != "paused"

    def _next_event(self) -> ev.DownloadEvent | None:
        """Return what has happened: the end of the work first, so that a command finds what is."""
        if self._work is not None and self._work.done():
            work, self._work = self._work, None
            if work.cancelled():  # not by us: what it waited for was cancelled
                error = InternalError(f"the download of {self._name} was interrupted; pull again to resume")
                return ev.WorkFailed(error, self._progress.done_bytes)
            return work.result()
        if self._commands:
            self._command = self._commands.popleft()
            self._command.was = "unknown" if self._state.phase == "none" else self._progress.state.phase
            return self._command.event
        return None

    def _decide(self, event: ev.DownloadEvent) -> tuple[ev.Action, ...]:
        before, transition = self._state, handle(self._state, event, cluster_clock.now_s())
        self._state = transition.state
        if self._state.phase == "blocked" != before.phase:
            log.warning("disk full, download blocked", model=self._name, reason=self._state.waiting_for)
        self._progress.set_state(with_decisions(self._progress.state, self._state))
        return tuple(transition.actions)

    async def _handle(self, event: ev.DownloadEvent) -> None:
        for action in self._decide(event):
            match action:
                case ev.Record():
                    await self._handle(await self._store(action))
                case ev.Work():
                    self._start_work(action)
                case ev.StopWork():
                    await self._stop_work()
                case ev.Begin(forget_sources):
                    self._begin(forget_sources)
                case ev.Publish():
                    await self._publish()
                case ev.EmitPaused():
                    log.info("download paused", model=self._name)
                    await self._context.events.emit("download_paused", model=self._name)
                case ev.Answer(text) if self._command is not None and not self._command.reply.done():
                    self._command.reply.set_result(CommandReply(text, self._command.was, self._result))
                case ev.Refuse(error) if self._command is not None:
                    _refuse(self._command, error)

    # What only the sources know

    def on_waiting(self, reason: str) -> None:
        """Publish what a source is waited for, with the next second's update."""
        self._decide(ev.SourceWaiting(reason))

    def on_no_progress(self, path: str, stalled_s: float, reason: str) -> None:
        """Raise Unavailable if the download must not wait longer."""
        for action in self._decide(ev.ProgressStalled(path, stalled_s, reason)):
            if isinstance(action, ev.FailWork):
                raise action.error

    async def on_source_change(self, change: SourceChange) -> None:
        """Emit that another source serves a file."""
        fields = {"from": change.before, "to": change.now}
        await self._context.events.emit("download_source_changed", model=self._name, file=change.path, **fields)

    # Work

    def _begin(self, forget_sources: bool) -> None:
        log.info("download begins", model=self._name)
        self._begun_at_s = time.monotonic()
        if self._result.done():
            self._result = _new_result()
        self._progress.begin_attempt(forget_sources)
        self._steps = self._new_steps()
        self._trace_context = self._command.trace if self._command else contextvars.copy_context()
        step = telemetry.trace_step("transfer", model=self._name)
        self._span = self._trace_context.run(self._trace.enter_context, step)
        self._trace.enter_context(telemetry.count_running_download())

    def _start_work(self, work: ev.Work) -> None:
        self._work = asyncio.create_task(self._steps.run(work), context=self._trace_context)
        self._work.add_done_callback(lambda _: self._wakeup.set())

    async def _stop_work(self) -> None:
        """Stop what runs of an attempt. What it had to clean up after the next publish is cleaned up now."""
        if self._work is not None:
            await cancel_and_wait(self._work, deadline_s=_STOP_DEADLINE_S)
            self._work = None
        self._trace_context.run(self._trace.close)
        with suppress(ShoalError):
            await self._progress.close()

    async def _publish(self) -> None:
        if self._publishing is None:
            self._publishing = asyncio.create_task(self._progress.publish_forever())
        try:
            await self._progress.publish_changes()
        except ShoalError as e:
            log.warning("state not published, trying again", model=self._name, reason=e.message)

    async def _stop_publishing(self) -> None:
        if self._publishing is not None:
            await cancel_and_wait(self._publishing)
            self._publishing = None

    # Records

    async def _store(self, record: ev.Record) -> ev.DownloadEvent:
        try:
            return await self._change(record)
        except Exception as e:  # noqa: BLE001  # who sent the command must get an answer
            error = as_shoal_error(e, self.ref)
            log.warning("not stored", model=self._name, what=type(record).__name__, reason=error.message)
            return ev.NotStored(error)

    async def _change(self, record: ev.Record) -> ev.DownloadEvent:
        requests, name = self._context.requests, self._name
        match record:
            case ev.StoreRequest(command, layers, force):
                return ev.RequestStored((await requests.request(name, command, layers, force)).layers)
            case ev.StorePause(error):
                await requests.pause(name, error)
                self._end_waiting(error)
                return ev.PauseStored()
            case ev.StoreResume():
                return ev.ResumeStored((await requests.resume(name)).layers)
            case ev.RemoveRequest():
                cancelled = Cancelled(f"the download of {name} was cancelled")
                await requests.end(name, cancelled)
                self._forget_token()
                self._end_waiting(cancelled)
                return ev.RequestRemoved()
            case ev.Discard():
                await self._discard()
                return ev.Discarded()
            case ev.StoreAgain():
                await requests.republish(name)
                await self._progress.publish()
                return ev.StoredAgain()
        assert isinstance(record, ev.StoreEnd)
        await self._store_end(record.release)
        return ev.EndStored()

    async def _store_end(self, release: bool) -> None:
        state = self._progress.state
        if release:
            with suppress(ShoalError):
                await self._steps.release()
        await self._progress.publish_changes()
        error = from_body(state.error) if state.error else None
        # The request is done. If it were kept, a model lost later would be downloaded again unasked.
        await self._context.requests.end(self._name, error or self._progress.state)
        self._forget_token()
        self._end_waiting(error)
        if error is not None and self._span is not None:
            telemetry.mark_failed(self._span, error.message)
        await self._stop_work()
        await self._stop_publishing()
        if error is None:
            return
        log.warning("download failed", model=self._name, reason=error.message, code=error.code)
        if state.phase == "rejected":
            figures = {name: n for name, n in error.details.items() if name.endswith("_bytes") and n is not None}
            await self._context.events.emit("download_rejected", model=self._name, message=error.message, **figures)
        else:
            fields = {"code": error.code, "message": error.message}
            await self._context.events.emit("download_failed", model=self._name, **fields)

    def _forget_token(self) -> None:
        """Forget the token of who pulled, unless another revision is still being pulled."""
        if all(ModelRef.parse(name).repo != self.ref.repo for name in self._context.requests.names):
            self._context.hub.tokens.forget(self.ref.repo, self._begun_at_s)

    async def _discard(self) -> None:
        """Raises if storage is down: the state then stays, so that the next attempt, or the next start, continues."""
        await self._stop_publishing()
        await self._steps.release()
        await self._context.buckets.state.delete(self._key)
        self._set_up(None)
        log.info("download cancelled", model=self._name)

    def _end_waiting(self, error: ShoalError | None) -> None:
        if self._result.done():
            return
        if error is None:
            self._result.set_result(self._progress.state)
        else:
            self._result.set_exception(error)


def _new_result() -> asyncio.Future[DownloadState]:
    result: asyncio.Future[DownloadState] = asyncio.get_running_loop().create_future()
    result.add_done_callback(lambda f: f.cancelled() or f.exception())
    return result


def _refuse(command: _Command, error: ShoalError) -> None:
    if not command.reply.done():
        command.reply.set_exception(error)
