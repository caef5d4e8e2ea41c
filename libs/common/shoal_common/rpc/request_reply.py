"""RPC between services: NATS micro endpoints, typed and concurrent.

A call raises what the handler raised (same class, same message), NodeDown if nobody listens, and Expired when the
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
from shoal_common.bus.network_use import require_network_allowed
from shoal_common.errors import Expired, InternalError, NodeDown, ShoalError, Unavailable, error_body, from_body
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Empty, RpcReply

T = TypeVar("T")
log = StructuredLogger("questions")

RPC_TIMEOUT_S = 10.0
MAX_CONCURRENT_REQUESTS = 64
PING = "ping"
"""The verb that every RPC service answers, to show that it is alive."""
_RETRY_INTERVAL_S = 0.25
_MICRO_DEADLINE_S = 2.0


class RpcClient:
    """Calls other services. `restart_wait_s`: how long to wait for one that restarts before it counts as down."""

    def __init__(self, nats: Nats) -> None:
        self._nats = nats

    async def __call__(
        self,
        service: str,
        node: str,
        verb: str,
        request: object,
        reply_type: type[T],
        deadline_s: float = RPC_TIMEOUT_S,
        restart_wait_s: float = 0.0,
    ) -> T:
        """Call `service` on `node` and return its reply as `reply_type`."""
        require_network_allowed()
        loop = asyncio.get_running_loop()
        patient_until_s = loop.time() + restart_wait_s
        give_up_s = loop.time() + max(deadline_s, restart_wait_s)
        subject = subjects.rpc(service, node, verb)
        while True:
            try:
                with telemetry.sending(f"svc.{service}.{verb}"):
                    reply = await self._nats.client.request(
                        subject,
                        encode(request),
                        timeout=max(give_up_s - loop.time(), 0.1),
                        headers=telemetry.headers(),
                    )
                break
            except NoRespondersError:
                if loop.time() >= patient_until_s:
                    raise NodeDown(
                        f"{service} of node {node} does not answer {verb}: see `shoal status`, "
                        f"or restart it there with `shoal restart {service}`"
                    ) from None
                await asyncio.sleep(_RETRY_INTERVAL_S)
            except NatsTimeoutError:
                raise Expired(f"{service} of node {node} did not answer {verb} in {deadline_s:.0f} s") from None
            except ConnectionClosedError:
                raise Unavailable("the connection to NATS is closed") from None
        return result_of(reply.data, reply_type)


def result_of(reply: bytes, kind: type[T]) -> T:
    """Return the result in a reply. Raises the error that it holds instead, and BadMessage."""
    answer = decode(reply, RpcReply)
    if answer.error is not None:
        raise from_body(answer.error)
    return decode(bytes(answer.result), kind)


class RpcEndpoint(msgspec.Struct, frozen=True):
    """A verb that a service answers: the request's struct, and the handler."""

    request_type: type[Any]
    handler: Callable[[Any], Awaitable[object]]


async def serve(
    nats: Nats, service: str, node: str, endpoints: Mapping[str, RpcEndpoint], stopping: asyncio.Event
) -> None:
    """Answer requests until `stopping`, then finish those that are running. Runs as a task of the service."""
    endpoints = {**endpoints, PING: RpcEndpoint(Empty, _ping)}
    semaphore = asyncio.Semaphore(MAX_CONCURRENT_REQUESTS)
    async with asyncio.TaskGroup() as tasks:

        async def accept(verb: str, question: RpcEndpoint, request: Request) -> None:
            # nats-py handles one request at a time per endpoint: start a task and return.
            if not request._msg.reply or subjects.is_from_consumer(request._msg.reply):
                return  # a plain `nats pub`: nobody waits for the reply
            await semaphore.acquire()
            tasks.create_task(answer(verb, question, request))

        async def answer(verb: str, question: RpcEndpoint, request: Request) -> None:
            try:
                reply = encode(await _reply(service, verb, question, request))
                if len(reply) > nats.client.max_payload:
                    reply = encode(RpcReply(error=InternalError(f"the reply to {verb} is too large for NATS").body()))
                await request.respond(reply, headers=telemetry.headers())
            except NatsError as e:
                log.warning("reply could not be sent", verb=verb, reason=str(e) or type(e).__name__)
            finally:
                semaphore.release()

        micro = Service(
            nats.client,
            ServiceConfig(name=f"shoal-{service}", version=VERSION, description=f"{service} of node {node}"),
        )
        await _wait_uncancelled(micro.start())
        for verb, question in endpoints.items():

            async def handler(request: Request, verb: str = verb, question: RpcEndpoint = question) -> None:
                await accept(verb, question, request)

            await micro.add_endpoint(
                EndpointConfig(
                    name=verb,
                    subject=subjects.rpc(service, node, verb),
                    handler=handler,
                    queue_group=f"{service}-{node}",
                )
            )
        await stopping.wait()
        # Stop receiving first (callers see at once that this service is down), then finish the running requests.
        # Drained, not stopped: what has arrived is still answered, while micro's own stop would drop it.
        subscriptions = [e._subscription for e in micro._endpoints] + list(micro._subscriptions.values())
        await _wait_uncancelled(*(s.drain() for s in subscriptions if s is not None))
        for _ in range(MAX_CONCURRENT_REQUESTS):
            await semaphore.acquire()


async def _ping(request: Empty) -> Empty:
    return request


async def _wait_uncancelled(*coroutines: Coroutine[Any, Any, None]) -> None:
    # These flush, and cancelling a flush of nats-py also cancels the connection's read loop.
    running = [asyncio.ensure_future(c) for c in coroutines]
    for task in running:
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
    await asyncio.wait(running, timeout=_MICRO_DEADLINE_S)


async def _reply(service: str, verb: str, question: RpcEndpoint, request: Request) -> RpcReply:
    with telemetry.processing(f"svc.{service}.{verb}", request.headers) as span:
        try:
            result = await question.handler(decode(request.data, question.request_type))
        except ShoalError as e:
            telemetry.mark_failed(span, e.message)
            return RpcReply(error=e.body())
        except Exception as e:  # noqa: BLE001  # the caller is owed a reply; the log has the trace
            log.error("request failed", exc=e, verb=verb)
            telemetry.mark_failed(span, str(e))
            return RpcReply(error=error_body(e))
        return RpcReply(result=msgspec.Raw(encode(result)))
