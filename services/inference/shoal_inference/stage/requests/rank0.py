"""Rank 0's side of a request: tokenise, admit, feed the prompt, then a token for each that comes back."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

import msgspec
from msgspec import structs

from shoal_common.errors import Busy, ErrorBody, Expired, InternalError, ShoalError, StageLost, from_body
from shoal_common.logs import StructuredLogger
from shoal_common.messages import DECODE_ERRORS
from shoal_common.messages.generation import Accepted, Generate, TokenEvent
from shoal_inference.stage.compute import prefill
from shoal_inference.stage.errors import LinkError
from shoal_inference.stage.ipc.messages import RequestAccepted, RequestEvent
from shoal_inference.stage.requests.kv_budget import KvBudget, Preempted
from shoal_inference.stage.requests.pipeline import StagePipeline
from shoal_inference.stage.requests.request_table import PassResult, RequestState
from shoal_inference.stage.ring.frames import End, Flag, Frame, Kind, Open, make_frame

SLOT_GRACE_S = 0.25
"""How long a request beyond the limit waits for one to end before it is told `busy`."""
ROOM_S = 900.0
"""How long an accepted request waits for room in the cache: others may have long answers to give."""
WAITING_S = 15.0
"""How often it says meanwhile that it does."""

log = StructuredLogger("stage.rank0")


class Rank0Driver:
    """Drives every request of the instance, each in a task of its own."""

    def __init__(self, core: StagePipeline, group: asyncio.TaskGroup) -> None:
        self._core = core
        self._group = group
        self._slots = asyncio.Semaphore(core.start.max_requests)
        self._window = prefill.window(core.start.stages)
        self._room: KvBudget | None = None
        """None until the model is loaded, which may say how long a context is."""

    def generate(self, ask: Generate) -> None:
        """Begin a request, or say at once why not. One that is in flight is left to end."""
        core = self._core
        if core.requests.named(ask.request) is not None:
            log.info("duplicate request ignored", request=ask.request)
            return
        error: ShoalError | None = None
        if len(core.requests) >= 2 * core.start.max_requests:
            error = self._busy()
        elif not core.can_serve:
            error = StageLost(
                f"rank 0 of instance {core.start.instance} is not connected to its neighbours: ask again in a moment"
            )
        if error is not None:
            core.emit(RequestEvent(event=TokenEvent(request=ask.request, error=error.body())))
            return
        entry = RequestState(secrets.token_bytes(16), ask.request, asyncio.get_running_loop().time())
        entry.next_index = len(ask.generated_tokens)
        core.requests.add(entry)
        entry.driver = self._group.create_task(self._run_request(entry, ask), name=f"request {ask.request}")

    def cancel(self, request: str) -> None:
        """Stop a request; the rank that owns its last word says so."""
        entry = self._core.requests.named(request)
        if entry is None:
            return
        if entry.opened and self._core.successor is not None:
            self._broadcast_end(entry, "cancelled")
            self._core.requests.end(entry)
        else:
            self._core.requests.say_cancelled(entry)

    async def on_frame(self, frame: Frame) -> None:
        """What came back around the ring; never waits, so the ring cannot wait for itself."""
        header = frame.header
        entry = self._core.requests.get(header.request)
        if entry is None:
            # A FAIL may well come after this rank saw the same loss itself.
            if header.kind is not Kind.FAIL and self._core.requests.unknown(header.request):
                log.debug("frame of an ended request dropped", kind=header.kind.name)
            return
        if header.kind is Kind.FAIL:
            self._core.fail_request(entry, _failure(frame))
        elif header.kind is Kind.TOKEN:
            token = int.from_bytes(frame.payload, "little") if frame.payload else None
            answer = PassResult(header.seq, token, Flag.FINISHED in header.flags)
            try:
                entry.answers.put_nowait(answer)
            except asyncio.QueueFull:
                self._core.fail_request(entry, InternalError("more results came back than passes were started"))
        else:
            self._core.fail_request(entry, InternalError(f"{header.kind.name} came back to rank 0"))

    async def _run_request(self, entry: RequestState, ask: Generate) -> None:
        try:
            await self._take_slot()
            try:
                prompt = await self._encode(ask)
                plan = await self._core.on_thread(self._core.engine.plan, ask, prompt)
                accepted = Accepted(request=ask.request, prompt_tokens=plan.prompt_tokens)
                self._core.emit(RequestAccepted(accepted=accepted))
                if plan.ended is not None:
                    # An earlier epoch had finished the answer but for saying so.
                    event = TokenEvent(request=ask.request, index=plan.first_index, finish_reason=plan.ended)
                    self._core.emit(RequestEvent(event=event))
                    self._core.requests.end(entry)
                    return
                seed = secrets.randbits(63) if ask.seed is None else ask.seed
                opening = _opening(ask, plan, seed)
                while True:
                    try:
                        await self._answer(entry, plan, opening)
                        return
                    except Preempted:
                        plan, opening = _continued(plan, opening, entry.said)
                        entry = self._restart_after_preemption(entry, plan)
            finally:
                self._slots.release()
        except ShoalError as error:
            self._core.fail_request(entry, error)

    async def _encode(self, ask: Generate) -> Sequence[int]:
        if ask.prompt_tokens or not ask.messages:
            return ask.prompt_tokens
        await self._core.loaded.wait()
        return await self._core.encoder.encode(ask.messages)

    async def _take_slot(self) -> None:
        # The client has an answer's end before word of it is back here: that must not refuse its next request.
        try:
            async with asyncio.timeout(SLOT_GRACE_S):
                await self._slots.acquire()
        except TimeoutError as error:
            raise self._busy() from error

    def _busy(self) -> Busy:
        return Busy(
            f"{self._core.start.max_requests} requests are in flight, the most this instance allows: ask again later"
        )

    async def _answer(self, entry: RequestState, plan: prefill.PrefillPlan, opening: Open) -> None:
        """One attempt, to its end. Raises Displaced, with what it has generated in `entry.said`."""
        core, room = self._core, self._room_of()
        await self._enter(room, entry, plan)
        try:
            await self._open(entry, opening)
            answered = 0
            for step in prefill.steps(len(plan.feed), core.start.prefill_chunk_tokens):
                while entry.next_seq - answered >= self._window:
                    answered = (await self._next(entry, answered)).seq
                await room.extend(entry.key, len(plan.feed))
                await self._pass(entry, plan.feed[step.start : step.stop], step.sample)
            while True:
                answer = await self._next(entry, answered)
                answered = answer.seq
                if answer.finished:
                    break
                if answer.token is not None:
                    entry.said.append(answer.token)
                    await room.extend(entry.key, len(plan.feed) + len(entry.said))
                    await self._pass(entry, (answer.token,), True)
            self._broadcast_end(entry, "finished")
            core.requests.end(entry)
        finally:
            room.release(entry.key)

    def _room_of(self) -> KvBudget:
        if self._room is None:
            self._room = KvBudget(self._core.engine.context_tokens, self._core.start.max_parallel_answers)
        return self._room

    async def _enter(self, room: KvBudget, entry: RequestState, plan: prefill.PrefillPlan) -> None:
        waiting = self._group.create_task(self._say_waiting(entry.request))
        try:
            async with asyncio.timeout(ROOM_S):
                await room.acquire(entry.key, len(plan.feed), again=entry.again)
        except TimeoutError as error:
            raise Busy(
                f"instance {self._core.start.instance} had no free cache for {len(plan.feed)} tokens "
                f"in {ROOM_S:g} s, because other requests use it: ask again later, or place it for more answers"
            ) from error
        finally:
            waiting.cancel()

    async def _say_waiting(self, request: str) -> None:
        while True:
            await asyncio.sleep(WAITING_S)
            self._core.emit(RequestEvent(event=TokenEvent(request=request, index=-1)))

    def _restart_after_preemption(self, entry: RequestState, plan: prefill.PrefillPlan) -> RequestState:
        """A fresh attempt in the place of one that was displaced, which is ended in every stage."""
        core = self._core
        log.info("request preempted", request=entry.request, tokens=plan.first_index)
        fresh = RequestState(secrets.token_bytes(16), entry.request, asyncio.get_running_loop().time())
        fresh.next_index, fresh.again = plan.first_index, True
        fresh.driver, entry.driver = entry.driver, None
        core.requests.displaced += 1
        core.requests.add(fresh)
        if entry.opened:
            self._broadcast_end(entry, "displaced")
        core.requests.end(entry)
        return fresh

    async def _open(self, entry: RequestState, opening: Open) -> None:
        core = self._core
        await core.on_thread(core.engine.open, entry.key, opening)
        if core.successor is not None:
            entry.opened = True  # before waiting: a request cancelled in `send` is known to the others already
            try:
                await core.successor.send(core.open_frame(entry, opening))
            except LinkError as error:
                raise core.stage_lost(1, error) from error

    async def _pass(self, entry: RequestState, tokens: tuple[int, ...], sample: bool) -> None:
        timeout_s = self._core.start.step_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._core.step(entry, tokens, sample)
        except TimeoutError as error:
            raise self._silent(entry, "rank 0 itself did not finish and send a pass") from error

    async def _next(self, entry: RequestState, answered: int) -> PassResult:
        """The next answer; each must be to the pass after the last one answered."""
        try:
            async with asyncio.timeout(self._core.start.step_timeout_s):
                answer = await entry.answers.get()
        except TimeoutError as error:
            waited = f"pass {answered + 1} of {entry.next_seq} did not come back from ranks 1 to "
            raise self._silent(entry, f"{waited}{self._core.start.stages - 1}") from error
        if answer.seq != answered + 1:
            raise InternalError(f"pass {answer.seq} came back when {answered + 1} was due")
        return answer

    def _silent(self, entry: RequestState, what: str) -> Expired:
        start = self._core.start
        return Expired(
            f"request {entry.request} of instance {start.instance}: {what} within {start.step_timeout_s} s; "
            "a stage is stuck or too slow"
        )

    def _broadcast_end(self, entry: RequestState, reason: str) -> None:
        core = self._core
        core.send_control(make_frame(Kind.END, core.ring, entry.key, meta=msgspec.json.encode(End(reason=reason))))


def _opening(ask: Generate, plan: prefill.PrefillPlan, seed: int) -> Open:
    return Open(
        request=ask.request,
        first_index=plan.first_index,
        max_tokens=plan.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=seed,
        generated=tuple(ask.generated_tokens),
    )


def _continued(plan: prefill.PrefillPlan, opening: Open, said: Sequence[int]) -> tuple[prefill.PrefillPlan, Open]:
    """The same after these tokens of the answer."""
    first = plan.first_index + len(said)
    return (
        structs.replace(plan, feed=(*plan.feed, *said), first_index=first),
        structs.replace(opening, first_index=first, generated=(*opening.generated, *said)),
    )


def _failure(frame: Frame) -> ShoalError:
    try:
        return from_body(msgspec.json.decode(frame.meta, type=ErrorBody))
    except DECODE_ERRORS as error:
        return InternalError(f"a stage ended the request with an undecodable reason: {error}")
