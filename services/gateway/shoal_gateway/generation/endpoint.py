"""Endpoint `POST /v1/chat/completions`: an answer as one JSON body, or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal_common.errors import Busy, Failed
from shoal_common.logs import Log
from shoal_common.messages.generation import FinishReason, Generate
from shoal_common.messages.instances import InstanceSpec
from shoal_common.rpc.command_client import new_id
from shoal_gateway.context import Gateway, gateway_of
from shoal_gateway.generation import openai
from shoal_gateway.generation.generation import Generation, generating
from shoal_gateway.generation.instance_selection import choose
from shoal_gateway.generation.token_stream import StopScanner
from shoal_gateway.http_errors import as_shoal_error, shoal_error_body
from shoal_gateway.rest.http_json import read_body, reply, unless_gone

log = Log("chat")

MAX_IN_FLIGHT = 512
"""Requests that this gateway keeps open. Instances have their own, lower limits."""


class Piece(msgspec.Struct, frozen=True):
    """Text that can be sent, and the number of tokens received so far."""

    text: str
    completion_tokens: int
    finish_reason: FinishReason | None = None


class Job(msgspec.Struct, frozen=True):
    """A parsed request and the instance that answers it."""

    asked: openai.ChatRequest
    spec: InstanceSpec
    question: Generate
    head: openai.Head


async def chat_completions(request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    gateway = gateway_of(request)
    job = _understand(gateway, openai.read_chat(await read_body(request)))
    if job.asked.stream:
        return EventStream(gateway, job)
    return await unless_gone(request.receive, _whole(gateway, job))


def _understand(gateway: Gateway, asked: openai.ChatRequest) -> Job:
    identity = new_id()
    gateway.sender.require_nats()
    if gateway.in_flight.total() >= MAX_IN_FLIGHT:
        raise Busy(
            f"this node has {MAX_IN_FLIGHT} requests in flight, the most it allows; try again, or another node"
        )
    spec = choose(gateway.picture(), asked.model, gateway.in_flight)
    head = openai.Head(
        request=identity,
        created=int(time.time()),
        model=asked.model,
        fingerprint=openai.fingerprint(spec),
        with_usage=asked.stream_options is not None and asked.stream_options.include_usage,
    )
    return Job(asked, spec, openai.generate_question(asked, spec, identity), head)


async def _whole(gateway: Gateway, job: Job) -> Response:
    texts: list[str] = []
    async with (
        generating(gateway, job.spec, job.question) as generation,
        aclosing(_pieces(generation, job.asked.stops)) as pieces,
    ):
        async for piece in pieces:
            texts.append(piece.text)
            if piece.finish_reason is not None:
                counts = openai.usage(generation.prompt_tokens, piece.completion_tokens)
                return reply(openai.completion(job.head, "".join(texts), piece.finish_reason, counts))
    raise Failed("the answer ended without a finish reason; try again")


async def _pieces(generation: Generation, stops: Sequence[str]) -> AsyncGenerator[Piece, None]:
    scanner, count = StopScanner(stops), 0
    async with aclosing(generation.events()) as events:
        async for event in events:
            count += 1
            text = scanner.push(event.text)
            if scanner.stopped:
                generation.outcome = "stop"
                yield Piece(text, count, "stop")
                return
            if event.finish_reason is not None:
                yield Piece(text + scanner.rest(), count, event.finish_reason)
                return
            yield Piece(text, count)


async def _chunks(gateway: Gateway, job: Job) -> AsyncGenerator[bytes, None]:
    """Yield the stream's events. An error before the first is raised; a later one becomes an event."""
    begun = False
    try:
        async with (
            generating(gateway, job.spec, job.question) as generation,
            aclosing(_pieces(generation, job.asked.stops)) as pieces,
        ):
            async for piece in pieces:
                if not begun:
                    begun = True
                    yield openai.role_chunk(job.head)
                if piece.text:
                    yield openai.text_chunk(job.head, piece.text)
                if piece.finish_reason is not None:
                    yield openai.finish_chunk(job.head, piece.finish_reason)
                    if job.head.with_usage:
                        counts = openai.usage(generation.prompt_tokens, piece.completion_tokens)
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


class EventStream(Response):
    """A streamed answer. Its status is sent with the first token, so an earlier error has its own HTTP status."""

    def __init__(self, gateway: Gateway, job: Job) -> None:
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
            await unless_gone(receive, self._send_all(send))

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
            async with asyncio.timeout(self._gateway.settings.limits.silence_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            raise ClientDisconnect from None
