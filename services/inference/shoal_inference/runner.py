"""One stage of one instance on this node, from fetching its model to its last token: a process and its story."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from contextlib import suppress

from msgspec import structs
from nats.errors import Error as NatsError

from shoal_common import subjects
from shoal_common.buckets import Buckets, model_key, part_key, stage_key
from shoal_common.config import Config
from shoal_common.connection import Nats
from shoal_common.credentials import derive
from shoal_common.errors import Failed, ShoalError, StageLost, Unavailable, from_body
from shoal_common.interfaces import Interfaces
from shoal_common.kv import REQUESTS_AT_ONCE
from shoal_common.logs import Log
from shoal_common.messages import commands, encode
from shoal_common.messages.questions import Accepted, Generate, TokenEvent
from shoal_common.messages.records import ModelState, PartState, StageState
from shoal_common.questions import Ask
from shoal_common.reach import for_others
from shoal_common.sending import Sender, new_id
from shoal_common.sight import Sight
from shoal_common.tensors import covers
from shoal_common.watch import View
from shoal_inference.decide import Assignment, next_address, respawn_delay_s, stage_error
from shoal_inference.lease import leased
from shoal_inference.speed import Speed, read_bytes
from shoal_inference.stage import control
from shoal_inference.stage.errors import LinkClosed
from shoal_inference.stage.spawn import StageProcess

log = Log("stage")

_FETCH_DEADLINE_S = 24 * 3600.0
_ACCEPT_DEADLINE_S = 30.0
_STEADY_S = 30.0
"""A process that lived this long was well: its death counts as the first."""


class StageRunner:
    """Runs one assignment until cancelled, and is the only writer of its `state.stage` key."""

    def __init__(
        self,
        assignment: Assignment,
        config: Config,
        nats: Nats,
        buckets: Buckets,
        state: View,
        interfaces: Interfaces,
        speed: Speed,
    ) -> None:
        self.assignment, self._interfaces, self._speed = assignment, interfaces, speed
        self._config, self._nats, self._bucket, self._view = config, nats, buckets.state, state
        self._sender, self._ask, self._sight = Sender(nats, buckets), Ask(nats), Sight(nats, config.node)
        self._spec, self._stage = assignment.spec, assignment.stage
        self._key = stage_key(self._spec.id, self._stage.rank)
        self._state = StageState(
            instance=self._spec.id,
            rank=self._stage.rank,
            node=config.node,
            epoch=self._spec.epoch,
            phase="fetching",
        )
        self._said: StageState | None = None
        self._process: StageProcess | None = None
        self._accepting: dict[str, asyncio.Future[Accepted]] = {}
        self._gave_way: ShoalError | None = None

    @property
    def pid(self) -> int | None:
        """Of the stage's process, while there is one."""
        process = self._process
        return None if process is None else process.pid

    @property
    def ready(self) -> bool:
        """Whether the stage is loaded and both its neighbours are connected."""
        return self._state.phase == "ready"

    async def run(self) -> None:
        """Fetch, load, serve; again after each death of the process, with back-off. Ends by cancellation."""
        deaths = 0
        loop = asyncio.get_running_loop()
        while True:
            born_s = loop.time()
            try:
                await self._fetch()
                await self._live()
            except ShoalError as e:
                error = e
            if self._gave_way is not None:
                error = self._gave_way
            deaths = 1 if loop.time() - born_s > _STEADY_S else deaths + 1
            log.warning(
                "stage ended", instance=self._spec.id, rank=self._stage.rank, why=error.message, deaths=deaths
            )
            self._fail_accepting(error)
            await self._say(phase="failed", error=error.body(), address="", links=[], uid="")
            if self._gave_way is not None:
                await asyncio.Event().wait()  # until people stop the instance, or it is placed anew
            await asyncio.sleep(respawn_delay_s(deaths))

    def give_way(self, error: ShoalError) -> None:
        """Kill the process, if there is one, and start no other: the machine needs the memory."""
        if self.pid is not None and self._gave_way is None:
            self._gave_way = error
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def withdraw(self) -> None:
        """The stage is gone from this node: say so."""
        await self._bucket.delete(self._key)

    # Life of one process

    async def _fetch(self) -> None:
        """Have this node's fetcher bring what this stage needs of the model, if that is not here."""
        node, model = self._config.node, self._spec.model
        layers = [self._stage.first_layer, self._stage.last_layer]
        if self._view.get(model_key(node, model), ModelState) is not None:
            return
        part = self._view.get(part_key(node, model), PartState)
        if part is not None and covers(part.layers, layers):
            return
        await self._say(phase="fetching", error=None)
        command = commands.Download(model=model, layers=layers, deadline_s=_FETCH_DEADLINE_S, unless_paused=True)
        outcome = await self._sender.outcome_of("fetcher", node, "download", command, new_id(), _FETCH_DEADLINE_S)
        if outcome.error is not None:
            raise from_body(outcome.error)

    async def _live(self) -> None:
        """One process: start it, follow what it says. Raises why it ended."""
        await self._say(phase="loading", error=None, uid=uuid.uuid4().hex[:8])
        spec, stage = self._spec, self._stage
        # The process ends before its lease does, whichever way we leave.
        async with (
            leased(self._ask, self._config.node, self.assignment) as lease,
            await StageProcess.spawn() as process,
        ):
            await self._send(
                process,
                control.Start(
                    instance=spec.id,
                    epoch=spec.epoch,
                    rank=stage.rank,
                    stages=len(spec.stages),
                    nodes=tuple(planned.node for planned in spec.stages),
                    model_dir=lease.view,
                    lock=lease.lock,
                    leaves=lease.leaves,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    context_tokens=spec.context_tokens,
                    answers=spec.asked.answers,
                    max_requests=max(spec.asked.answers, REQUESTS_AT_ONCE),
                    bind_host=self._config.bind,
                    secret=derive(self._config.secret, f"activations/{spec.id}").encode(),
                ),
            )
            self._process = process
            linking = asyncio.create_task(self._keep_linked(process))
            try:
                async for event in process:
                    await self._on(event)
            finally:
                self._process = None
                linking.cancel()
        code = await process.wait()
        if self._state.error is not None:
            raise from_body(self._state.error)
        raise StageLost(f"stage {stage.rank} of {spec.id} on node {self._config.node} died (status {code})")

    async def _keep_linked(self, process: StageProcess) -> None:
        """Tell the process where its successor is, now and whenever that changes."""
        if len(self._spec.stages) == 1:
            return
        told = ""
        while True:
            seen = self._view.changes
            states = (s for _, s in self._view.items(f"stage.{self._spec.id}.", StageState))
            address = next_address(self._spec, self._stage.rank, states, self._interfaces.now)
            if address and address != told:
                host, _, port = address.rpartition(":")
                await self._send(process, control.Link(host=host.strip("[]"), port=int(port)))
                told = address
            await self._view.changed_after(seen)

    async def _send(self, process: StageProcess, message: control.ToChild) -> None:
        try:
            await process.send(message)
        except LinkClosed as e:
            raise StageLost(str(e)) from e

    async def _on(self, event: control.FromChild) -> None:
        match event:
            case control.Listening(port=port):
                links = for_others(self._config.links(port, self._interfaces.now)) if port else []
                self._state = structs.replace(self._state, links=links, address=links[0].address if links else "")
            case control.Loaded():
                alone = len(self._spec.stages) == 1
                await self._say(phase="ready" if alone else "linking", weight_bytes=event.weight_bytes, error=None)
                log.info("stage loaded", instance=self._spec.id, rank=self._stage.rank, load_s=round(event.load_s, 2))
            case control.Linked():
                await self._say(phase="ready", error=None)
            case control.Unlinked(reason=reason, rank=rank):
                log.warning("stage unlinked", instance=self._spec.id, rank=self._stage.rank, why=reason)
                if rank < len(self._spec.stages):
                    await self._sight.lost(self._spec.stages[rank].node, reason)
                await self._say(phase="linking")
            case control.Accepted():
                self._accept(event)
            case control.Token():
                await self._publish(
                    TokenEvent(
                        request=event.request,
                        index=event.index,
                        token=event.token,
                        text=event.text,
                        finish_reason=event.finish_reason,
                    )
                )
            case control.Waiting(request=request):
                await self._publish(TokenEvent(request=request, index=-1))
            case control.Pace(pass_s=pass_s):
                self._note_pace(pass_s)
            case control.Failed():
                await self._failed(event)
            case control.Fatal():
                error = stage_error(event.code, event.message)
                self._state = structs.replace(self._state, error=error.body())
            case _:
                log.debug("stage says", event=type(event).__name__)

    def _note_pace(self, pass_s: float) -> None:
        # Of a model that came in parts only some other node may have the shape.
        models = (m for _, m in self._view.items("model.", ModelState) if m.model == self._spec.model)
        shape = next((m.shape for m in models if m.shape is not None), None)
        if shape is not None:
            self._speed.note(read_bytes(shape, self._stage.first_layer, self._stage.last_layer), pass_s)

    # Requests

    async def generate(self, question: Generate) -> Accepted:
        """Begin an answer; tokens follow on their subject. Raises what the stage answers."""
        process = self._process
        if process is None or not self.ready:
            raise StageLost(
                f"instance {self._spec.id} is not ready: its stage {self._stage.rank} on node {self._config.node} is "
                f"{self._state.phase}; see `shoal ps`"
            )
        if question.request in self._accepting:
            raise Failed(f"request {question.request} is under way already")
        accepted: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        self._accepting[question.request] = accepted
        prompt: tuple[control.Message | int, ...] = tuple(question.prompt_tokens) or tuple(
            control.Message(role=m.role, content=m.content) for m in question.messages
        )
        try:
            await self._send(
                process,
                control.Generate(
                    request=question.request,
                    reply=subjects.tokens(question.request),
                    prompt=prompt,
                    max_tokens=question.max_tokens,
                    temperature=question.temperature,
                    top_p=question.top_p,
                    seed=question.seed,
                    generated=tuple(question.generated),
                ),
            )
            async with asyncio.timeout(_ACCEPT_DEADLINE_S):
                return await accepted
        except TimeoutError:
            raise Unavailable(f"instance {self._spec.id} did not accept the prompt in time") from None
        finally:
            self._accepting.pop(question.request, None)

    async def cancel(self, request: str) -> None:
        """Nobody reads this answer any more."""
        if self._process is not None:
            with suppress(StageLost):
                await self._send(self._process, control.Cancel(request=request))

    def _accept(self, event: control.Accepted) -> None:
        waiting = self._accepting.get(event.request)
        if waiting is not None and not waiting.done():
            waiting.set_result(Accepted(request=event.request, prompt_tokens=event.prompt_tokens))

    async def _failed(self, event: control.Failed) -> None:
        error = stage_error(event.code, event.message)
        waiting = self._accepting.get(event.request)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        else:
            await self._publish(TokenEvent(request=event.request, error=error.body()))

    def _fail_accepting(self, error: ShoalError) -> None:
        for waiting in self._accepting.values():
            if not waiting.done():
                waiting.set_exception(error)

    async def _publish(self, event: TokenEvent) -> None:
        # Core NATS: whoever waits for it is there now, or never will be.
        with suppress(NatsError):
            await self._nats.client.publish(subjects.tokens(event.request), encode(event))

    async def _say(self, **changes: object) -> None:
        self._state = structs.replace(self._state, **changes)
        if self._state != self._said:
            self._said = self._state
            await self._bucket.put(self._key, self._state)
