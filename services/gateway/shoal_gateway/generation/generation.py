"""Request one answer from an instance, receive its tokens in order, and cancel it when the reader leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from shoal_common.bus import subjects
from shoal_common.bus.keys import liveness_key, stage_key
from shoal_common.bus.kv_mirror import any_changed
from shoal_common.errors import BadMessage, Cancelled, Expired, ShoalError, StageLost, from_body
from shoal_common.http.errors import TooLarge
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Empty
from shoal_common.messages.generation import Accepted, CancelGenerate, Generate, TokenEvent
from shoal_common.messages.instances import InstanceSpec, StageState
from shoal_common.messages.liveness import LivenessRecord
from shoal_gateway.cluster.snapshot import nodes_lost
from shoal_gateway.context import GatewayContext
from shoal_gateway.generation.instance_selection import lost_stage_reason
from shoal_gateway.generation.token_stream import TokenReorderBuffer
from shoal_gateway.http_errors import as_shoal_error
from shoal_gateway.settings import GatewayTimeouts

log = StructuredLogger("generation")

_CANCEL_TIMEOUT_S = 5.0
_MAX_INBOX = 65536
"""Most tokens that wait here for a slow client; a further one is dropped, and the answer fails."""
_INBOX_SPARE = 64
"""Places beyond the tokens asked for: duplicates, and the error of a lost stage."""
_HEADROOM_BYTES = 4096
"""The part of NATS's largest payload that headers may take."""

Inbox = asyncio.Queue[TokenEvent]


class Generation:
    """A request to an instance. `finished` once the instance holds nothing of it any more."""

    def __init__(self, spec: InstanceSpec, inbox: Inbox, timeouts: GatewayTimeouts) -> None:
        self._spec, self._inbox, self._timeouts = spec, inbox, timeouts
        self.prompt_tokens = 0
        self.finished = False
        self.outcome = ""
        """How the answer ended: `stop`, `length`, `cancelled` or an error's code. "" while it goes on."""
        self.token_count = 0
        self._started_s = asyncio.get_running_loop().time()
        self._first_token_s: float | None = None

    async def token_events(self) -> AsyncGenerator[TokenEvent, None]:
        """Yield the tokens in order, each once, up to the one with a finish reason. Raises the error that ends it."""
        order, now_s = TokenReorderBuffer(), asyncio.get_running_loop().time
        gap_until_s: float | None = None
        while True:
            timeout_s = self._timeouts.silence_s if order.next_index else self._timeouts.first_token_s
            until_s = now_s() + timeout_s if gap_until_s is None else gap_until_s
            try:
                async with asyncio.timeout_at(until_s):
                    arrived = await self._inbox.get()
            except TimeoutError:
                raise self._timeout_error(order, timeout_s) from None
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
                    raise Cancelled(f"this answer was cancelled at instance {self._spec.id}; ask again")
                self._count_token()
                yield event
                if event.finish_reason is not None:
                    return
            if not order.has_gap:
                gap_until_s = None
            elif gap_until_s is None:
                gap_until_s = now_s() + self._timeouts.gap_s

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

    def _timeout_error(self, order: TokenReorderBuffer, timeout_s: float) -> ShoalError:
        name = f"instance {self._spec.id} of {self._spec.repo}"
        if order.has_gap:
            return Expired(
                f"token {order.next_index} from {name} was lost in transit and did not arrive within "
                f"{self._timeouts.gap_s:g} s; ask again",
                token_index=order.next_index,
            )
        return Expired(
            f"{name} sent nothing for {timeout_s:g} s after {order.next_index} tokens; try again, or see `shoal ps`",
            token_index=order.next_index,
        )


@asynccontextmanager
async def start_generation(
    gateway: GatewayContext, spec: InstanceSpec, request: Generate
) -> AsyncIterator[Generation]:
    """Ask an instance and receive its answer inside the body. Leaving before the end cancels it there."""
    client, timeouts = gateway.context.nats.client, gateway.settings.timeouts
    _check_size(request, client.max_payload)
    inbox: Inbox = asyncio.Queue(maxsize=min(request.max_tokens, _MAX_INBOX) + _INBOX_SPARE)
    generation = Generation(spec, inbox, timeouts)

    async def arrived(message: Msg) -> None:
        if subjects.is_from_consumer(message.reply):
            return
        try:
            event = decode(message.data, TokenEvent)
        except BadMessage as e:
            log.warning("undecodable token ignored", request=request.request, reason=e.message)
            return
        # A full inbox means that more tokens came than were asked for; a dropped one shows as a gap.
        with suppress(asyncio.QueueFull):
            inbox.put_nowait(event)

    # Subscribe before asking: the first token may be faster than the reply.
    subscription = await client.subscribe(subjects.tokens(request.request), cb=arrived)
    watching = asyncio.create_task(_until_stage_lost(gateway, spec))
    gateway.in_flight[spec.id] += 1
    try:
        generation.prompt_tokens = (await _send_request(gateway, spec, request, generation, watching)).prompt_tokens
        watching.add_done_callback(lambda done: _push_stage_lost(inbox, done))
        yield generation
    except Exception as e:
        generation.outcome = generation.outcome or as_shoal_error(e).code
        raise
    finally:
        generation.log_end(request.request)
        gateway.in_flight[spec.id] -= 1
        watching.cancel()
        with suppress(NatsError):
            await subscription.unsubscribe()
        if not generation.finished:
            # Not awaited: a dead instance would hold up the leaving client until the time-out.
            gateway.tasks.create_task(_cancel(gateway, spec, request.request))


def _check_size(request: Generate, max_payload_bytes: int) -> None:
    size_bytes, limit_bytes = len(encode(request)), max_payload_bytes - _HEADROOM_BYTES
    if size_bytes > limit_bytes:
        raise TooLarge(
            f"the messages are {size_bytes} bytes, more than the {limit_bytes} that fit in one request; shorten them",
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


async def _send_request(
    gateway: GatewayContext,
    spec: InstanceSpec,
    request: Generate,
    generation: Generation,
    watching: asyncio.Task[StageLost],
) -> Accepted:
    call = asyncio.create_task(
        gateway.context.rpc(
            "inference",
            spec.stages[0].node,
            "generate",
            request,
            Accepted,
            deadline_s=gateway.settings.timeouts.accept_s,
        )
    )
    try:
        await asyncio.wait({call, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            raise watching.result()
        return call.result()
    except ShoalError as e:
        # Refused, or nobody received it: there is nothing to cancel. After a time-out or a lost stage there may be.
        generation.finished = not isinstance(e, Expired | StageLost)
        raise
    finally:
        call.cancel()
        await asyncio.wait({call})


async def _until_stage_lost(gateway: GatewayContext, spec: InstanceSpec) -> StageLost:
    """Wait until a stage can no longer answer; return the error that names it."""

    def lost_reason() -> str | None:
        stages = {s.rank: gateway.state.get(stage_key(spec.id, s.rank), StageState) for s in spec.stages}
        live = {
            s.node: {"inference": record}
            for s in spec.stages
            if (record := gateway.live.get(liveness_key(s.node, "inference"), LivenessRecord)) is not None
        }
        lost_s = nodes_lost(live, gateway.state)
        present = live.keys() - lost_s.keys()
        return lost_stage_reason(spec, {rank: s for rank, s in stages.items() if s is not None}, present, lost_s)

    while True:
        versions = (gateway.state.changes, gateway.live.changes)
        reason = lost_reason()
        if reason is not None:
            return StageLost(f"instance {spec.id} of {spec.repo} lost a stage: {reason}; ask again in a moment")
        await any_changed((gateway.state, gateway.live), versions)


def _push_stage_lost(inbox: Inbox, watching: asyncio.Task[StageLost]) -> None:
    if watching.cancelled():
        return
    problem = watching.exception() or watching.result()
    error = (
        problem
        if isinstance(problem, ShoalError)
        else StageLost(f"the stages can no longer be watched: {problem}; ask again in a moment")
    )
    if inbox.full():
        inbox.get_nowait()
    inbox.put_nowait(TokenEvent(request="", error=error.body()))


async def _cancel(gateway: GatewayContext, spec: InstanceSpec, request: str) -> None:
    """Cancel an answer at its instance. Where nobody answers there is nothing to free."""
    question = CancelGenerate(instance=spec.id, request=request)
    try:
        await gateway.context.rpc(
            "inference", spec.stages[0].node, "cancel", question, Empty, deadline_s=_CANCEL_TIMEOUT_S
        )
    except (ShoalError, NatsError) as e:
        log.debug("answer not cancelled", request=request, reason=str(e) or type(e).__name__)
