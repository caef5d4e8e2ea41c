"""RPC between services: NATS micro endpoints, typed and concurrent.

A call raises what the handler raised (same class, same message), NodeAway if nobody listens, and Expired when the
deadline passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from nats.errors import ConnectionClosedError, NoRespondersError
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.micro.request import Request
from nats.micro.service import EndpointConfig, Service, ServiceConfig

from shoal_common import VERSION, telemetry
from shoal_common.bus import subjects
from shoal_common.bus.connection import Nats
from shoal_common.errors import Expired, Failed, NodeAway, ShoalError, Unavailable, as_body, from_body
from shoal_common.logs import Log
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Answer, Done

T = TypeVar("T")
log = Log("questions")

ASK_DEADLINE_S = 10.0
MAX_ASKED_AT_ONCE = 64
HERE = "here"
"""The verb that every RPC service answers, to show that it is alive."""
_AWAY_RETRY_S = 0.25
_MICRO_DEADLINE_S = 2.0


class Ask:
    """Calls other services. `patience_s` is how long to wait for one that is restarting before it counts as down."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats

    async def __call__(
        self,
        service: str,
        node: str,
        verb: str,
        question: object,
        kind: type[T],
        deadline_s: float = ASK_DEADLINE_S,
        patience_s: float = 0.0,
    ) -> T:
        """Call `service` on `node` and return its reply as `kind`."""
        loop = asyncio.get_running_loop()
        patient_until_s = loop.time() + patience_s
        give_up_s = loop.time() + max(deadline_s, patience_s)
        subject = subjects.question(service, node, verb)
        while True:
            try:
                with telemetry.sending(f"svc.{service}.{verb}"):
                    reply = await self._nats.client.request(
                        subject,
                        encode(question),
                        timeout=max(give_up_s - loop.time(), 0.1),
                        headers=telemetry.headers(),
                    )
                break
            except NoRespondersError:
                if loop.time() >= patient_until_s:
                    raise NodeAway(
                        f"{service} of node {node} does not answer {verb}: see `shoal status`, "
                        f"or restart it there with `shoal restart {service}`"
                    ) from None
                await asyncio.sleep(_AWAY_RETRY_S)
            except NatsTimeoutError:
                raise Expired(f"{service} of node {node} did not answer {verb} in {deadline_s:.0f} s") from None
            except ConnectionClosedError:
                raise Unavailable("the connection to NATS is closed") from None
        answer = decode(reply.data, Answer)
        if answer.error is not None:
            raise from_body(answer.error)
        return decode(bytes(answer.result), kind)


class Question(msgspec.Struct, frozen=True):
    """A verb that a service answers: the request's struct, and the handler."""

    kind: type[Any]
    answer: Callable[[Any], Awaitable[object]]


async def serve(
    nats: Nats, service: str, node: str, questions: Mapping[str, Question], stopping: asyncio.Event
) -> None:
    """Answer requests until `stopping`, then finish those that are running. Runs as a task of the service."""
    questions = {**questions, HERE: Question(Done, _here)}
    semaphore = asyncio.Semaphore(MAX_ASKED_AT_ONCE)
    async with asyncio.TaskGroup() as tasks:

        async def accept(verb: str, question: Question, request: Request) -> None:
            # nats-py handles one request at a time per endpoint: start a task and return.
            if not request._msg.reply:
                return  # a plain `nats pub`: nobody waits for the reply
            await semaphore.acquire()
            tasks.create_task(answer(verb, question, request))

        async def answer(verb: str, question: Question, request: Request) -> None:
            try:
                reply = encode(await _reply(service, verb, question, request))
                if len(reply) > nats.client.max_payload:
                    reply = encode(Answer(error=Failed(f"the reply to {verb} is too large for NATS").body()))
                await request.respond(reply, headers=telemetry.headers())
            except NatsError as e:
                log.warning("reply could not be sent", verb=verb, why=str(e) or type(e).__name__)
            finally:
                semaphore.release()

        micro = Service(
            nats.client,
            ServiceConfig(name=f"shoal-{service}", version=VERSION, description=f"{service} of node {node}"),
        )
        await _unhurried(micro.start())
        for verb, question in questions.items():

            async def handler(request: Request, verb: str = verb, question: Question = question) -> None:
                await accept(verb, question, request)

            await micro.add_endpoint(
                EndpointConfig(
                    name=verb,
                    subject=subjects.question(service, node, verb),
                    handler=handler,
                    queue_group=f"{service}-{node}",
                )
            )
        await stopping.wait()
        # Stop receiving first (callers see at once that this service is down), then finish the running requests.
        # Drained, not stopped: what has arrived is still answered, while micro's own stop would drop it.
        subscriptions = [e._subscription for e in micro._endpoints] + list(micro._subscriptions.values())
        await _unhurried(*(s.drain() for s in subscriptions if s is not None))
        for _ in range(MAX_ASKED_AT_ONCE):
            await semaphore.acquire()


async def _here(question: Done) -> Done:
    return question


async def _unhurried(*coroutines: Coroutine[Any, Any, None]) -> None:
    # These flush, and cancelling a flush of nats-py also cancels the connection's read loop.
    running = [asyncio.ensure_future(c) for c in coroutines]
    for task in running:
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
    await asyncio.wait(running, timeout=_MICRO_DEADLINE_S)


async def _reply(service: str, verb: str, question: Question, request: Request) -> Answer:
    with telemetry.processing(f"svc.{service}.{verb}", request.headers) as span:
        try:
            result = await question.answer(decode(request.data, question.kind))
        except ShoalError as e:
            telemetry.failed(span, e.message)
            return Answer(error=e.body())
        except Exception as e:  # noqa: BLE001  # the caller is owed a reply; the log has the trace
            log.error("request failed", exc=e, verb=verb)
            telemetry.failed(span, str(e))
            return Answer(error=as_body(e))
        return Answer(result=msgspec.Raw(encode(result)))
