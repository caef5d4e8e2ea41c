"""Endpoint `POST /v1/chat/completions`: an answer as one JSON body, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

import msgspec
from msgspec import structs
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal_common.errors import Busy, InternalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.generation import Generate, TokenEvent
from shoal_common.messages.instances import InstanceSpec
from shoal_common.rpc.command_client import new_command_id
from shoal_gateway.context import GatewayContext, gateway_of
from shoal_gateway.generation import openai
from shoal_gateway.generation.generation import Generation, start_generation
from shoal_gateway.generation.instance_selection import select_instance
from shoal_gateway.generation.token_stream import StopScanner
from shoal_gateway.http_errors import as_shoal_error, shoal_error_body
from shoal_gateway.rest.http_json import cancel_on_disconnect, json_response

log = StructuredLogger("chat")

MAX_IN_FLIGHT = 512
"""Requests that this gateway keeps open. Instances have their own, lower limits."""


class ChatJob(msgspec.Struct, frozen=True):
    """A parsed request and the instance that answers it."""

    request: openai.ChatRequest
    spec: InstanceSpec
    question: Generate
    head: openai.AnswerHeader


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    gateway = gateway_of(request)
    job = _to_job(gateway, openai.parse_request(await request.body()))
    if job.request.stream:
        return ChatStreamResponse(gateway, job)
    return await cancel_on_disconnect(request.receive, _complete(gateway, job))


def _to_job(gateway: GatewayContext, request: openai.ChatRequest) -> ChatJob:
    identity = new_command_id()
    gateway.sender.require_nats()
    if gateway.in_flight.total() >= MAX_IN_FLIGHT:
        raise Busy(
            f"this node has {MAX_IN_FLIGHT} requests in flight, the most it allows; try again, or another node"
        )
    spec = select_instance(gateway.snapshot(), request.model, gateway.in_flight)
    head = openai.AnswerHeader(
        request=identity,
        created=int(time.time()),
        model=request.model,
        fingerprint=openai.fingerprint(spec),
        with_usage=request.stream_options is not None and request.stream_options.include_usage,
    )
    return ChatJob(request, spec, openai.to_generate(request, spec, identity), head)


async def _complete(gateway: GatewayContext, job: ChatJob) -> Response:
    texts: list[str] = []
    async with (
        start_generation(gateway, job.spec, job.question) as generation,
        aclosing(_cut_at_stops(generation, job.request.stops)) as events,
    ):
        async for event in events:
            texts.append(event.text)
            if event.finish_reason is not None:
                counts = openai.usage(generation.prompt_tokens, generation.token_count)
                return json_response(openai.completion(job.head, "".join(texts), event.finish_reason, counts))
    raise InternalError("the answer ended without a finish reason; try again")


async def _cut_at_stops(generation: Generation, stops: Sequence[str]) -> AsyncGenerator[TokenEvent, None]:
    """Yield the tokens, each with the text that can be sent by now, up to the end or a stop string."""
    scanner = StopScanner(stops)
    async with aclosing(generation.token_events()) as events:
        async for event in events:
            text, reason = scanner.push(event.text), event.finish_reason
            if scanner.stopped:
                generation.outcome = reason = "stop"
            elif reason is not None:
                text += scanner.flush()
            yield structs.replace(event, text=text, finish_reason=reason)
            if reason is not None:
                return


async def _chunks(gateway: GatewayContext, job: ChatJob) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events. An error before the first is raised; a later one becomes an event."""
    begun = False
    try:
        async with (
            start_generation(gateway, job.spec, job.question) as generation,
            aclosing(_cut_at_stops(generation, job.request.stops)) as events,
        ):
            async for event in events:
                if not begun:
                    begun = True
                    yield openai.role_chunk(job.head)
                if event.text:
                    yield openai.text_chunk(job.head, event.text)
                if event.finish_reason is not None:
                    yield openai.finish_chunk(job.head, event.finish_reason)
                    if job.head.with_usage:
                        counts = openai.usage(generation.prompt_tokens, generation.token_count)
                        yield openai.usage_chunk(job.head, counts)
    except Exception as e:  # the client gets an event; the log gets the trace of a foreign exception
        if not begun:
            raise
        error = as_shoal_error(e)
        if error is not e:
            log.error("answer failed", exc=e, request=job.head.request)
        yield openai.sse(shoal_error_body(error))
        return
    yield openai.DONE


class ChatStreamResponse(Response):
    """A streamed answer. Its status is sent with the first token, so an earlier error has its own HTTP status."""

    def __init__(self, gateway: GatewayContext, job: ChatJob) -> None:
        self._gateway, self._job = gateway, job
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                # Tells proxies not to buffer, which would delay tokens.
                "X-Accel-Buffering": "no",
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; stop at once when the client disconnects."""
        # Not for the error handlers: part of this answer may be sent, and nobody reads another.
        with suppress(ClientDisconnect):
            await cancel_on_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        started = False
        async with aclosing(_chunks(self._gateway, self._job)) as chunks:
            async for chunk in chunks:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._send_in_time(send, chunk)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_in_time(self, send: Send, chunk: bytes) -> None:
        # A client that does not read must not keep its slot for ever.
        try:
            async with asyncio.timeout(self._gateway.settings.timeouts.silence_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            raise ClientDisconnect from None
