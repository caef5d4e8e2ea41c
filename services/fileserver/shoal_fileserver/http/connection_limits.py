"""Limits on HTTP connections, so that none can block the server: their number, request heads, slow readers.

uvicorn limits none of these (its `limit_concurrency` would refuse honest peers while idle connections fill it), so
its protocol is extended at its callbacks. `connection_eviction.py` decides which connection makes way for a new one.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import sys
import termios
import time
from concurrent.futures import Executor
from functools import partial
from io import FileIO
from typing import Any, cast

from starlette.responses import JSONResponse
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shoal_fileserver.http import connection_eviction
from shoal_fileserver.http.connection_eviction import ConnectionInfo
from shoal_fileserver.http.fast_path import FastPath
from shoal_fileserver.http.sendfile import FILE_SENDER_KEY, FileSender, send_now

MAX_HEAD_BYTES = 32 << 10
HEAD_TIMEOUT_S = 10.0
MAX_REFUSED_CONNECTIONS = 64
"""Further connections that get a 503; beyond them, new ones are closed without a response."""
RETRY_AFTER_S = 2
MIN_BYTES_PER_S = 16 << 10
"""Minimum rate of a reader while the server waits for it: a leaf a minute. A download that gets less from everyone
fails for want of progress anyhow, and a link of 10 Mbit/s has 70 times as much."""
RATE_CHECK_INTERVAL_S = 30.0
"""Time waited for a reader before its rate is checked: longer than lost packets take."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_PARTIAL = b"HTTP/1.1 206 Partial Content\r\n"
_SO_NWRITE = 0x1024
"""macOS socket option: bytes in a socket's queue."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """An HTTP connection."""

    threads: Executor
    fast_path: FastPath | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sent_bytes = 0
        """Bytes of files given to the socket or the transport."""
        self.refused = False
        """Whether the connection exceeds the limits; it gets a 503 and is closed."""
        self._answered = False
        self._unsent: tuple[FileIO, int, int] | None = None
        self._idle_since_s = time.monotonic()
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._paused_at_s: float | None = None
        self._waited_s = 0.0
        self._read_at_wait_start_bytes = 0
        self._drain_timer: asyncio.TimerHandle | None = None

    # Connecting

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for a request until the deadline; evict a connection if this is one too many."""
        super().connection_made(transport)
        # Pause writing as soon as the socket takes no more: what follows is sent by sendfile, not from the buffer.
        transport.set_write_buffer_limits(0)
        self._expect_head()
        self._enforce_limits()

    def _enforce_limits(self) -> None:
        others = [c for c in self.connections if isinstance(c, LimitedHttpProtocol) and c is not self]
        accepted = [c for c in others if not c.refused]
        now_s = time.monotonic()
        decision = connection_eviction.connection_to_evict(self.host, [c.info(now_s) for c in accepted])
        if isinstance(decision, int):
            victim = accepted[decision]
            # Now, not when its loss is noticed: the next connection must not evict the same one.
            self.connections.discard(victim)
            victim.transport.abort()
        elif decision is connection_eviction.REFUSE_NEW:
            self.refused = True
            if len(others) - len(accepted) >= MAX_REFUSED_CONNECTIONS:
                self.connections.discard(self)
                self.transport.abort()

    def info(self, now_s: float) -> ConnectionInfo:
        """Return what decides which connection is evicted."""
        idle_s = now_s - self._idle_since_s if self._idle else None
        return ConnectionInfo(self.host, idle_s, None if self._paused_at_s is None else now_s - self._paused_at_s)

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def host(self) -> str:
        """Address of the peer."""
        return self.client[0] if self.client else ""

    # Requesting

    def data_received(self, data: bytes) -> None:
        """Receive part of a request. A head that is too large is refused."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is None and self.timeout_keep_alive_task is None and self._idle:
            self._expect_head(len(data))
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """Start a request; on the fast path it is answered here."""
        self._head_arrived()
        self._answered = self._try_fast_path()
        if not self._answered:
            super().on_headers_complete()

    def _try_fast_path(self) -> bool:
        """Send a leaf on the fast path; a task sends what the socket does not take. False if it is not possible."""
        if (
            self.parser.get_method() != b"GET"
            or not self._idle
            or self.refused
            or not self.parser.should_keep_alive()
        ):
            return False
        leaf = self.fast_path.respond(self.url, self.headers) if self.fast_path else None
        if leaf is None or self.flow.write_paused or self.transport.is_closing():
            return False
        head = _PARTIAL + b"".join(b"%b: %b\r\n" % each for each in self.server_state.default_headers) + leaf.head
        rest = send_now(self.transport, leaf, head + b"\r\n")
        self.sent_bytes += rest - leaf.start
        if rest < leaf.end:
            self._unsent = FileIO(os.dup(leaf.fd)), rest, leaf.end
            return False
        self._idle_since_s = time.monotonic()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        return True

    def eof_received(self) -> bool | None:  # type: ignore[override]  # as asyncio has it; uvicorn says None
        """Keep the connection until the response is sent: the peer only closed its sending side."""
        if self._idle:
            return None
        self.cycle.keep_alive = False
        return True

    def on_body(self, body: bytes) -> None:
        """Receive part of a request's body."""
        if not self._answered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Finish receiving a request."""
        if not self._answered:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        sending = cycle.scope["state"][FILE_SENDER_KEY] = FileSender(self, cycle)
        if self._unsent is not None:
            (file, start, end), self._unsent = self._unsent, None
            app = cast(ASGI3Application, partial(sending.send_rest, file, start, end))
        super()._start_asgi_task(cycle, _BUSY_APP if self.refused else app)

    def on_response_complete(self) -> None:
        """Finish a response."""
        self._idle_since_s = time.monotonic()
        self._reset_wait()
        super().on_response_complete()

    def _expect_head(self, received_bytes: int = 0) -> None:
        self._head_bytes = received_bytes
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _head_arrived(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # Sending: the time in which the peer does not read is summed up, and its rate checked.

    def pause_writing(self) -> None:
        """Start a wait for a peer that has not read what was sent."""
        super().pause_writing()
        if self._waited_s >= RATE_CHECK_INTERVAL_S:  # sum of short waits, each of which ended before its timer
            self._check_rate()
            return
        if not self._waited_s:
            self._read_at_wait_start_bytes = self._read_bytes
        self._paused_at_s = time.monotonic()
        self._drain_timer = self.loop.call_later(RATE_CHECK_INTERVAL_S - self._waited_s, self._check_rate)

    def resume_writing(self) -> None:
        """End the wait."""
        if self._paused_at_s is not None:
            self._waited_s = min(self._waited_s + time.monotonic() - self._paused_at_s, RATE_CHECK_INTERVAL_S)
        self._end_wait()
        super().resume_writing()

    def _check_rate(self) -> None:
        if self._read_bytes - self._read_at_wait_start_bytes < MIN_BYTES_PER_S * RATE_CHECK_INTERVAL_S:
            self.transport.abort()
            return
        self._waited_s = 0.0
        self.pause_writing()

    @property
    def _read_bytes(self) -> int:
        """Bytes that the peer has read, up to a constant: only differences are meaningful."""
        unread = self.transport.get_write_buffer_size() + _queued_bytes(self.transport.get_extra_info("socket"))
        return self.sent_bytes - unread

    def _end_wait(self) -> None:
        self._paused_at_s = None
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def _reset_wait(self) -> None:
        self._end_wait()
        self._waited_s = 0.0

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        self._head_arrived()
        self._reset_wait()
        super().connection_lost(exc)


def limited_protocol(fast_path: FastPath, threads: Executor) -> type[LimitedHttpProtocol]:
    """Return the protocol of a server with this fast path, which sends everything else in these threads."""

    class FastPathProtocol(LimitedHttpProtocol):
        pass

    FastPathProtocol.fast_path, FastPathProtocol.threads = fast_path, threads
    return FastPathProtocol


_BUSY_APP = cast(
    ASGI3Application,
    JSONResponse(
        {"error": {"message": "this node has as many connections as it can serve; try again in a moment"}},
        503,
        {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"},
    ),
)


def _queued_bytes(transport_socket: Any) -> int:
    """Return the bytes in the kernel's queue that the peer has not acknowledged."""
    try:
        if sys.platform == "linux":
            return int(struct.unpack("i", fcntl.ioctl(transport_socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
        return int(transport_socket.getsockopt(socket.SOL_SOCKET, _SO_NWRITE))
    except OSError:  # just closed
        return 0
