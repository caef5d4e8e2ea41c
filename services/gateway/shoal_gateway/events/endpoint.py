"""Endpoint of events: the cluster's event log as server-sent events, resumable without loss."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal_common.errors import Busy
from shoal_gateway.context import GatewayContext, gateway_of
from shoal_gateway.events.log_reader import EventLogReader
from shoal_gateway.events.sse import end_event, parse_query, to_sse
from shoal_gateway.rest.http_json import cancel_on_disconnect
from shoal_gateway.rest.routing import route

MAX_CLIENTS = 64
"""Clients that follow events at the same time."""
_RETRY_MS = 1000
_FAREWELL_TIMEOUT_S = 30.0
"""For a client that was too slow to read the last message, which says where to resume."""


class _TooSlow(Exception):
    """The client read nothing for `silence_s`."""


class EventLogResponse(Response):
    """The events a client asked for, until it disconnects, the gateway stops, or it reads nothing for too long."""

    def __init__(self, gateway: GatewayContext, reader: EventLogReader) -> None:
        self._gateway, self._reader = gateway, reader
        self._sent_cursor: int | None = None
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",  # proxies that buffer would hold events back
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; for HEAD only the headers."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if scope["method"] != "HEAD":
            self._gateway.event_client_count += 1
            try:
                with suppress(ClientDisconnect):
                    await cancel_on_disconnect(receive, self._send_all(send))
            finally:
                self._gateway.event_client_count -= 1
        with suppress(_TooSlow):
            await self._send(send, b"", _FAREWELL_TIMEOUT_S, more=False)

    async def _send_all(self, send: Send) -> None:
        try:
            await self._send(send, f"retry: {_RETRY_MS}\n\n".encode())
            async with aclosing(self._reader.read()) as items:
                async for item in items:
                    await self._send(send, to_sse(item))
                    self._sent_cursor = item.cursor
        except _TooSlow:
            reason = f"nothing was read for {self._gateway.settings.timeouts.silence_s:g} s; resume from the cursor"
            with suppress(_TooSlow):
                await self._send(send, end_event(self._sent_cursor, reason), _FAREWELL_TIMEOUT_S)
            return
        if self._gateway.context.stopping.is_set():
            await self._send(send, end_event(self._sent_cursor, "this gateway stops; resume from the cursor"))

    async def _send(self, send: Send, data: bytes, within_s: float | None = None, more: bool = True) -> None:
        # Waits while the connection's buffer is full: nothing else is buffered for the client.
        try:
            async with asyncio.timeout(within_s or self._gateway.settings.timeouts.silence_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise _TooSlow from None


async def events(request: Request) -> Response:
    """`GET /events`."""
    gateway = gateway_of(request)
    query = parse_query(request.query_params, request.headers.get("last-event-id", ""))
    gateway.sender.require_nats()
    if gateway.event_client_count >= MAX_CLIENTS:
        raise Busy(
            f"node {gateway.node} has {MAX_CLIENTS} clients that follow events, the most it allows; try later, "
            "or another node"
        )
    quiet_s = gateway.settings.timeouts.keep_alive_s
    return EventLogResponse(gateway, EventLogReader(gateway.context.nats, query, quiet_s, gateway.context.stopping))


ROUTES = [route("/events", GET=events), route("/v1/events", GET=events)]
