"""An HTTP connection of which nothing is unbounded: the number of connections, request heads and bodies, and waiting.

uvicorn limits none of these (its `limit_concurrency` would refuse honest clients while idle connections fill it), so
its protocol is extended at its callbacks. `connection_eviction.py` decides which connection makes way for a new one,
`host_rule.py` which requests are meant for this server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar, cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from shoal_common.errors import ShoalError, Unavailable
from shoal_common.http import connection_eviction
from shoal_common.http.bounds import HttpBounds
from shoal_common.http.connection_eviction import ConnectionInfo
from shoal_common.http.errors import BodyTooSlow, HeadTooLarge, TooLarge
from shoal_common.http.host_rule import host_error, names_loopback
from shoal_common.http.same_user import is_forwarded, is_same_user
from shoal_common.http.tls_protocol import TlsHttpProtocol
from shoal_common.logs import StructuredLogger

log = StructuredLogger("http")

MAX_HEAD_BYTES = 32 << 10
"""The piece of up to 16 KB in which a head begins does not count."""
MAX_HEADERS = 128
HEAD_TIMEOUT_S = 10.0
MAX_PIPELINED = 8
"""Requests that wait on a connection for the response before theirs."""
UNCOUNTED_BODY_BYTES = 64 << 10
"""First bytes of each body, which count nowhere: large bodies do not keep small ones out."""
MIN_BYTES_PER_S = 16 << 10
"""Minimum rate of a client that the server waits for: a leaf a minute. A download that gets less from everyone fails
for want of progress anyhow, and a link of 10 Mbit/s has 70 times as much."""
RATE_CHECK_INTERVAL_S = 30.0
"""Time waited for a client before its rate is checked: longer than lost packets take."""

_PIECE_BYTES = 16 << 10
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_BODY_ERROR = "shoal.body_error"
"""Key in a request's state of the error that its body met."""
OWN_REQUEST = "shoal.own_request"
"""Key in a request's state: whether a process of this user sent it, from this machine (`is_own_request`)."""


class HttpRules:
    """What the connections of one server share: its bounds, and the bytes of bodies that count now."""

    def __init__(self, bounds: HttpBounds, loopback_only: bool, respond: Callable[[ShoalError], Any]) -> None:
        self.bounds, self.loopback_only = bounds, loopback_only
        self.respond = respond
        """Returns the ASGI application that answers a request with an error, in the form of this server's API."""
        self.bodies_bytes = 0


class _RequestDropped(Exception):
    """Ends the parsing of a connection that is closed."""


class BoundedHttpProtocol(TlsHttpProtocol):
    """An HTTP connection."""

    rules: HttpRules

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.refused = False
        """Whether the connection is one too many; it gets a 503 and is closed."""
        self._idle_since_s = time.monotonic()
        self._answered = False
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_body = False
        self._body_bytes = 0
        self._body_bytes_at_check = 0
        self._body_since_s = 0.0
        self._body_timer: asyncio.TimerHandle | None = None
        self._counted_bytes = 0
        self._write_paused_at_s: float | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    # Connecting

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for a request until the deadline; evict a connection if this is one too many."""
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > min(self.rules.bounds.max_per_address, self.rules.bounds.max_connections):
            self._enforce_limits()

    def _enforce_limits(self) -> None:
        others = [c for c in self.connections if isinstance(c, BoundedHttpProtocol) and c is not self]
        accepted = [c for c in others if not c.refused]
        now_s = time.monotonic()
        infos = [c.info(now_s) for c in accepted]
        decision = connection_eviction.connection_to_evict(self.host, infos, self.rules.bounds)
        if isinstance(decision, int):
            victim = accepted[decision]
            # Now, not when its loss is noticed: the next connection must not evict the same one.
            self.connections.discard(victim)
            victim.transport.abort()
        elif decision is connection_eviction.REFUSE_NEW:
            log.warning("connection refused", address=self.host, connections=len(accepted))
            self.refused = True
            if len(others) - len(accepted) >= self.rules.bounds.max_refused:
                self.connections.discard(self)
                self.transport.abort()

    def info(self, now_s: float) -> ConnectionInfo:
        """Return what decides which connection is evicted."""
        if self._idle:
            return ConnectionInfo(self.host, idle_s=now_s - self._idle_since_s)
        since_s = self._write_paused_at_s
        if since_s is None and self._in_body and not self.flow.read_paused:
            since_s = self._body_since_s  # not the last byte: one that trickles takes a place too
        return ConnectionInfo(self.host, stalled_s=None if since_s is None else now_s - since_s)

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def host(self) -> str:
        """Address of the client."""
        return self.client[0] if self.client else ""

    @cached_property
    def _is_same_user(self) -> bool:
        connection = self.transport.get_extra_info("socket")
        return connection is not None and is_same_user(connection)

    def is_own_request(self) -> bool:
        """Return whether this user's own process sent this request, and for nobody else.

        Such a request needs no key. A page whose host name resolves to 127.0.0.1 (DNS rebinding) makes a browser of
        this user send requests too: they name that host.
        """
        return names_loopback(self.headers) and not is_forwarded(self.headers) and self._is_same_user

    # A request's head

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Receive part of a request. A head that is too large is refused."""
        for start in range(0, len(data), _PIECE_BYTES):
            if self.transport.is_closing():
                return
            self._receive(data[start : start + _PIECE_BYTES])

    def _receive(self, piece: bytes) -> None:
        # Before the parser sets it to 0 where a head begins: the request before it may have had most of this piece.
        self._head_bytes += len(piece)
        super().data_received(piece)
        if self.transport.is_closing():
            return
        if self._in_head and (self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS):
            self._close_with(_HEAD_TOO_LARGE)
            return
        if self._in_body:
            if self._body_timer is None:
                self._expect_body()
        elif self._head_timer is None and self.timeout_keep_alive_task is None and self._idle:
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        if self._idle:
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _close_with(self, response: bytes) -> None:
        if self._idle:
            self.transport.write(response)
            self.transport.close()
        else:  # not in the middle of another response
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Start a head."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start a request."""
        self._head_ended()
        self._in_body, self._body_bytes, self._body_bytes_at_check = True, 0, 0
        self._body_since_s = time.monotonic()
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
            raise _RequestDropped
        error = self._head_error()
        self._answered = error is None and self.answer_now()
        if self._answered:
            return
        if error is None:
            self.app = cast(ASGI3Application, self.config.loaded_app)
            self.scope["state"][OWN_REQUEST] = self.is_own_request()
        else:
            self.app, self.url = self.rules.respond(error), b"/"  # the target may be one that uvicorn cannot parse
        super().on_headers_complete()
        if self.refused:
            self.cycle.keep_alive = False
        declared = next((value for name, value in self.headers if name == b"content-length"), b"")
        if declared.isdigit() and int(declared) > self.rules.bounds.max_body_bytes:
            self._fail_body(self._too_large())

    def _head_error(self) -> ShoalError | None:
        if self.refused:
            return Unavailable("this node has as many connections as it can serve; try again in a moment")
        if len(self.headers) > MAX_HEADERS:
            return HeadTooLarge(f"a request has at most {MAX_HEADERS} headers")
        return host_error(self.url, self.headers, self.rules.loopback_only)

    def answer_now(self) -> bool:
        """Answer a request from its head alone, without a task; return whether that was done."""
        return False

    def _head_ended(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # A request's body

    def on_body(self, body: bytes) -> None:
        """Receive part of a body. One that exceeds a bound is dropped, and its request fails."""
        self._body_bytes += len(body)
        if self._answered or self.cycle.response_complete or _BODY_ERROR in self.cycle.scope["state"]:
            return
        bounds = self.rules.bounds
        counted = max(min(self._body_bytes - UNCOUNTED_BODY_BYTES, len(body)), 0)
        if self._body_bytes > bounds.max_body_bytes:
            self._fail_body(self._too_large())
        elif counted and self.rules.bodies_bytes + counted > bounds.max_bodies_bytes:
            log.warning("body refused", address=self.host, bodies_bytes=self.rules.bodies_bytes)
            self._fail_body(Unavailable("this node holds as many large requests as it can; try again in a moment"))
        else:
            self._counted_bytes += counted
            self.rules.bodies_bytes += counted
            super().on_body(body)

    def _too_large(self) -> TooLarge:
        limit = self.rules.bounds.max_body_bytes
        return TooLarge(
            f"the request body is larger than {limit} bytes, the most that is accepted", limit_bytes=limit
        )

    def _fail_body(self, error: ShoalError) -> None:
        """Raise the error where the application reads the body; disconnect if it has begun to respond."""
        cycle = self.cycle
        if cycle.response_started:
            self.transport.abort()
            return
        cycle.scope["state"][_BODY_ERROR] = error
        cycle.body = bytearray()
        self._release_body()
        cycle.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        super()._start_asgi_task(cycle, cast(ASGI3Application, partial(_run_with_bounded_body, app)))

    def _expect_body(self) -> None:
        self._body_timer = self.loop.call_later(RATE_CHECK_INTERVAL_S, self._check_body_rate)

    def _check_body_rate(self) -> None:
        received, self._body_bytes_at_check = self._body_bytes - self._body_bytes_at_check, self._body_bytes
        if received < MIN_BYTES_PER_S * RATE_CHECK_INTERVAL_S and not self.flow.read_paused:
            if self._idle or _BODY_ERROR in self.cycle.scope["state"]:
                self.transport.abort()
                return
            self.cycle.keep_alive = False
            self._fail_body(BodyTooSlow(f"the request body arrived at less than {MIN_BYTES_PER_S} bytes a second"))
        self._expect_body()

    def on_message_complete(self) -> None:
        """Finish receiving a request."""
        self._body_ended()
        if not self._answered:
            super().on_message_complete()

    def _body_ended(self) -> None:
        self._in_body = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _release_body(self) -> None:
        self.rules.bodies_bytes -= self._counted_bytes
        self._counted_bytes = 0

    # A response

    def pause_writing(self) -> None:
        """Start a wait for a client that has not read what was sent."""
        super().pause_writing()
        self._write_paused_at_s = time.monotonic()

    def resume_writing(self) -> None:
        """End the wait."""
        self._write_paused_at_s = None
        super().resume_writing()

    def on_response_complete(self) -> None:
        """Finish a response."""
        self._idle_since_s = time.monotonic()
        self._release_body()
        super().on_response_complete()
        unread_bytes = self.unsent_bytes
        if unread_bytes and self._unread_timer is None:
            self._expect_reader(unread_bytes)

    def _expect_reader(self, unread_bytes: int) -> None:
        self._unread_timer = self.loop.call_later(RATE_CHECK_INTERVAL_S, self._check_reader, unread_bytes)

    def _check_reader(self, unread_before_bytes: int) -> None:
        """Disconnect a client that read nothing of a complete response; one that reads slowly is waited for."""
        self._unread_timer = None
        unread_bytes = self.unsent_bytes
        if not unread_bytes or not self._idle:
            return
        if unread_bytes >= unread_before_bytes:
            self.transport.abort()
        else:
            self._expect_reader(unread_bytes)

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        self._head_ended()
        self._body_ended()
        self._release_body()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        super().connection_lost(exc)


async def _run_with_bounded_body(app: Any, scope: Any, receive: Any, send: Any) -> None:
    """Run an ASGI application to which a body that exceeds a bound is an error."""

    async def receive_or_raise() -> Any:
        message = None if _BODY_ERROR in scope["state"] else await receive()
        if _BODY_ERROR in scope["state"]:
            raise scope["state"][_BODY_ERROR]
        return message

    await app(scope, receive_or_raise, send)


P = TypeVar("P", bound=BoundedHttpProtocol)


def protocol_of(kind: type[P], **attributes: Any) -> type[P]:
    """Return the protocol of one server: `kind` with these class attributes, `rules` among them."""
    return cast(type[P], type(kind.__name__, (kind,), attributes))
