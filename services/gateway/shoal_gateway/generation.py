"""One answer from an instance: asked for, received in order, and cancelled when nobody wants the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from shoal_common import subjects
from shoal_common.buckets import live_key, stage_key
from shoal_common.errors import BadMessage, Expired, ShoalError, StageLost, Withdrawn, from_body
from shoal_common.logs import Log
from shoal_common.messages import decode, encode
from shoal_common.messages.facts import Live
from shoal_common.messages.questions import Accepted, CancelGenerate, Done, Generate, TokenEvent
from shoal_common.messages.records import InstanceSpec, StageState
from shoal_common.watch import any_changed
from shoal_gateway.choose import lost_stage
from shoal_gateway.errors import TooLarge
from shoal_gateway.errors_http import as_shoal_error
from shoal_gateway.gateway import Gateway
from shoal_gateway.settings import Limits
from shoal_gateway.tokens import InOrder

log = Log("generation")

_CANCEL_S = 5.0
_INBOX_MOST = 65536
"""Tokens that wait here for a slow client at most; one that would be beyond is lost, and the answer fails."""
_INBOX_SPARE = 64
"""Room beyond the tokens asked for: duplicates, and the word of a lost stage."""
_HEADROOM_BYTES = 4096
"""Of NATS's largest payload, what headers may take."""

Inbox = asyncio.Queue[TokenEvent]


class Generation:
    """An accepted request. `finished` once the instance has said its last word on it."""

    def __init__(self, spec: InstanceSpec, inbox: Inbox, limits: Limits) -> None:
        self._spec, self._inbox, self._limits = spec, inbox, limits
        self.prompt_tokens = 0
        self.finished = False
        self.outcome = ""
        """How the answer ended: `stop`, `length`, `cancelled` or an error's code. "" while it goes on."""
        self.token_count = 0
        self._started_s = asyncio.get_running_loop().time()
        self._first_token_s: float | None = None

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """The tokens in order, each once; ends after the one with a finish reason. Raises what ended it instead."""
        order, now_s = InOrder(), asyncio.get_running_loop().time
        gap_until_s: float | None = None
        while True:
            patience_s = self._limits.silence_s if order.next_index else self._limits.first_token_s
            until_s = now_s() + patience_s if gap_until_s is None else gap_until_s
            try:
                async with asyncio.timeout_at(until_s):
                    arrived = await self._inbox.get()
            except TimeoutError:
                raise self._late(order, patience_s) from None
            for event in order.push(arrived):
                if event.error is not None:
                    error = from_body(event.error)
                    # Where one stage is lost the others may still hold the request's cache.
                    self.finished = not isinstance(error, StageLost)
                    raise error
                if event.finish_reason is not None:
                    self.finished = True
                    self.outcome = event.finish_reason
                if event.finish_reason == "cancelled":
                    raise Withdrawn(f"somebody cancelled this answer at instance {self._spec.id}; ask again")
                self._count_token()
                yield event
                if event.finish_reason is not None:
                    return
            if not order.gap:
                gap_until_s = None
            elif gap_until_s is None:
                gap_until_s = now_s() + self._limits.gap_s

    def _count_token(self) -> None:
        self.token_count += 1
        if self._first_token_s is None:
            self._first_token_s = asyncio.get_running_loop().time() - self._started_s

    def log_end(self, request: str) -> None:
        """Log the one line of this answer. It never holds text of the prompt or of the answer."""
        log.info(
            "answer ended",
            request=request,
            model=self._spec.repo,
            instance=self._spec.id,
            prompt_tokens=self.prompt_tokens,
            tokens=self.token_count,
            first_token_s="-" if self._first_token_s is None else round(self._first_token_s, 3),
            total_s=round(asyncio.get_running_loop().time() - self._started_s, 3),
            outcome=self.outcome or "cancelled",
        )

    def _late(self, order: InOrder, patience_s: float) -> ShoalError:
        who = f"instance {self._spec.id} of {self._spec.repo}"
        if order.gap:
            return Expired(
                f"token {order.next_index} from {who} was lost on its way and did not come within "
                f"{self._limits.gap_s:g} s; ask again",
                token_index=order.next_index,
            )
        return Expired(
            f"{who} said nothing for {patience_s:g} s after token {order.next_index}; see `shoal status`",
            token_index=order.next_index,
        )


@asynccontextmanager
async def generating(gateway: Gateway, spec: InstanceSpec, question: Generate) -> AsyncIterator[Generation]:
    """Ask an instance and receive its answer inside the body. Leaving before the end cancels it at the instance."""
    client, limits = gateway.context.nats.client, gateway.settings.limits
    _check_size(question, client.max_payload)
    inbox: Inbox = asyncio.Queue(maxsize=min(question.max_tokens, _INBOX_MOST) + _INBOX_SPARE)
    generation = Generation(spec, inbox, limits)

    async def arrived(message: Msg) -> None:
        try:
            event = decode(message.data, TokenEvent)
        except BadMessage as e:
            log.warning("ignoring a token that does not decode", request=question.request, why=e.message)
            return
        # A full inbox means that more came than was asked for; what is dropped shows as a gap.
        with suppress(asyncio.QueueFull):
            inbox.put_nowait(event)

    # Subscribed before asking: the first token may be faster than the answer to the question.
    subscription = await client.subscribe(subjects.tokens(question.request), cb=arrived)
    watching = asyncio.create_task(_until_stage_lost(gateway, spec))
    gateway.in_flight[spec.id] += 1
    try:
        generation.prompt_tokens = (await _ask(gateway, spec, question, generation, watching)).prompt_tokens
        watching.add_done_callback(lambda done: _tell_lost(inbox, done))
        yield generation
    except Exception as e:
        generation.outcome = generation.outcome or as_shoal_error(e).code
        raise
    finally:
        generation.log_end(question.request)
        gateway.in_flight[spec.id] -= 1
        watching.cancel()
        with suppress(NatsError):
            await subscription.unsubscribe()
        if not generation.finished:
            # Not awaited: who leaves has no time, and a dead instance would take its deadline.
            gateway.tasks.create_task(_cancel(gateway, spec, question.request))


def _check_size(question: Generate, max_payload_bytes: int) -> None:
    size_bytes, limit_bytes = len(encode(question)), max_payload_bytes - _HEADROOM_BYTES
    if size_bytes > limit_bytes:
        raise TooLarge(
            f"the messages make {size_bytes} bytes and an instance can be sent {limit_bytes}; shorten them",
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


async def _ask(
    gateway: Gateway,
    spec: InstanceSpec,
    question: Generate,
    generation: Generation,
    watching: asyncio.Task[StageLost],
) -> Accepted:
    asking = asyncio.create_task(
        gateway.context.ask(
            "inference",
            spec.stages[0].node,
            "generate",
            question,
            Accepted,
            deadline_s=gateway.settings.limits.accept_s,
        )
    )
    try:
        await asyncio.wait({asking, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise watching.result()
        return asking.result()
    except ShoalError as e:
        # Refused, or nobody there: nothing runs that would have to be cancelled. Otherwise it may.
        generation.finished = not isinstance(e, Expired | StageLost)
        raise
    finally:
        asking.cancel()
        await asyncio.wait({asking})


async def _until_stage_lost(gateway: Gateway, spec: InstanceSpec) -> StageLost:
    """The error that says which stage can no longer answer, once one cannot."""

    def lost() -> str | None:
        stages = {s.rank: gateway.state.get(stage_key(spec.id, s.rank), StageState) for s in spec.stages}
        live = [s.node for s in spec.stages if gateway.live.get(live_key(s.node, "inference"), Live)]
        return lost_stage(spec, {rank: s for rank, s in stages.items() if s is not None}, live)

    while True:
        seen = (gateway.state.changes, gateway.live.changes)
        why = lost()
        if why is not None:
            return StageLost(f"instance {spec.id} of {spec.repo} lost a stage: {why}; ask again in a moment")
        await any_changed((gateway.state, gateway.live), seen)


def _tell_lost(inbox: Inbox, watching: asyncio.Task[StageLost]) -> None:
    if watching.cancelled():
        return
    problem = watching.exception() or watching.result()
    error = problem if isinstance(problem, ShoalError) else StageLost(f"lost sight of the stages: {problem}")
    if inbox.full():
        inbox.get_nowait()
    inbox.put_nowait(TokenEvent(request="", error=error.body()))


async def _cancel(gateway: Gateway, spec: InstanceSpec, request: str) -> None:
    """Free the slot. Where nobody answers there is nothing to free."""
    question = CancelGenerate(instance=spec.id, request=request)
    try:
        await gateway.context.ask("inference", spec.stages[0].node, "cancel", question, Done, deadline_s=_CANCEL_S)
    except (ShoalError, NatsError) as e:
        log.debug("an answer could not be cancelled", request=request, why=str(e))
