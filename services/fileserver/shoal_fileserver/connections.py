"""HTTP connections that cannot hold the server up: bounded in number, heads in size and time, readers in slowness.

uvicorn bounds none of these by itself (its `limit_concurrency` would refuse honest peers while idle connections
fill it), so its protocol is extended where it is told of them. Whose place a newcomer takes is decided in `crowd.py`.
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
from functools import partial
from io import FileIO
from typing import Any, cast

from starlette.responses import JSONResponse
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shoal_fileserver import crowd
from shoal_fileserver.at_once import AtOnce
from shoal_fileserver.crowd import Seen
from shoal_fileserver.sending import SENDING, Sending, send_at_once

MAX_HEAD_BYTES = 32 << 10
HEAD_DEADLINE_S = 10.0
MAX_REFUSED = 64
"""So many more connections are told that there is no room; beyond them, newcomers are closed without a word."""
RETRY_AFTER_S = 2
MIN_BYTES_PER_S = 16 << 10
"""What a reader has to take while it is waited for: a leaf in a minute. A download that gets less from everyone fails
for want of progress anyhow, and a link of 10 Mbit/s has 70 times as much."""
DRAIN_S = 30.0
"""So long a reader is waited for before its rate is looked at: longer than what lost packets cost."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_PARTIAL = b"HTTP/1.1 206 Partial Content\r\n"
_SO_NWRITE = 0x1024
"""macOS: bytes in a socket's queue."""


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    at_once: AtOnce | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.handed_bytes = 0
        """Bytes of files that the socket or the transport has been given."""
        self.refused = False
        """Whether there was no room for it: it is told so, and closed."""
        self._answered = False
        self._rest: tuple[FileIO, int, int] | None = None
        self._idle_since_s = time.monotonic()
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._paused_at_s: float | None = None
        self._waited_s = 0.0
        self._taken_then_bytes = 0
        self._drain_timer: asyncio.TimerHandle | None = None

    # Coming

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for a request, for a while; make room if this is one connection too many."""
        super().connection_made(transport)
        # Writing is paused as soon as the socket takes no more: what follows comes by sendfile, past the buffer.
        transport.set_write_buffer_limits(0)
        self._expect_head()
        self._find_room()

    def _find_room(self) -> None:
        everyone = [c for c in self.connections if isinstance(c, BoundedHttp) and c is not self]
        counted = [c for c in everyone if not c.refused]
        now_s = time.monotonic()
        leaving = crowd.make_room(self.host, [c.seen(now_s) for c in counted])
        if isinstance(leaving, int):
            victim = counted[leaving]
            # At once, not when its loss is noticed: the next newcomer must not choose the same one.
            self.connections.discard(victim)
            victim.transport.abort()
        elif leaving is crowd.NO_ROOM:
            self.refused = True
            if len(everyone) - len(counted) >= MAX_REFUSED:
                self.connections.discard(self)
                self.transport.abort()

    def seen(self, now_s: float) -> Seen:
        """What decides who has to go."""
        idle_s = now_s - self._idle_since_s if self._idle else None
        return Seen(self.host, idle_s, None if self._paused_at_s is None else now_s - self._paused_at_s)

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def host(self) -> str:
        """Where it comes from."""
        return self.client[0] if self.client else ""

    # Asking

    def data_received(self, data: bytes) -> None:
        """Part of a request. A head that goes on and on is refused."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is None and self.timeout_keep_alive_task is None and self._idle:
            self._expect_head(len(data))
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """A request begins. It may be answered right here."""
        self._head_arrived()
        self._answered = self._answer_at_once()
        if not self._answered:
            super().on_headers_complete()

    def _answer_at_once(self) -> bool:
        """Send a leaf that is at hand; what the socket does not take of it is left to a task. False: not at hand."""
        if (
            self.parser.get_method() != b"GET"
            or not self._idle
            or self.refused
            or not self.parser.should_keep_alive()
        ):
            return False
        leaf = self.at_once.answer(self.url, self.headers) if self.at_once else None
        if leaf is None or self.flow.write_paused or self.transport.is_closing():
            return False
        head = _PARTIAL + b"".join(b"%b: %b\r\n" % each for each in self.server_state.default_headers) + leaf.head
        rest = send_at_once(self.transport, leaf, head + b"\r\n")
        self.handed_bytes += rest - leaf.start
        if rest < leaf.end:
            self._rest = FileIO(os.dup(leaf.fd)), rest, leaf.end
            return False
        self._idle_since_s = time.monotonic()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        return True

    def eof_received(self) -> bool | None:  # type: ignore[override]  # as asyncio has it; uvicorn says None
        """The peer says no more: it may still read what it has asked for."""
        if self._idle:
            return None
        self.cycle.keep_alive = False
        return True

    def on_body(self, body: bytes) -> None:
        """Of a request's body."""
        if not self._answered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request has come whole."""
        if not self._answered:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        way = cycle.scope["state"][SENDING] = Sending(self, cycle)
        if self._rest is not None:
            (file, start, end), self._rest = self._rest, None
            app = cast(ASGI3Application, partial(way.rest, file, start, end))
        super()._start_asgi_task(cycle, _NO_ROOM if self.refused else app)

    def on_response_complete(self) -> None:
        """It has been answered."""
        self._idle_since_s = time.monotonic()
        self._forget_waiting()
        super().on_response_complete()

    def _expect_head(self, begun_bytes: int = 0) -> None:
        self._head_bytes = begun_bytes
        self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self.transport.abort)

    def _head_arrived(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # Reading: the time in which a peer does not take what it asked for is summed up, and its rate looked at.

    def pause_writing(self) -> None:
        """The peer has not taken what was written."""
        super().pause_writing()
        if self._waited_s >= DRAIN_S:  # in many short waits, none of which saw the timer's end
            self._look_at_rate()
            return
        if not self._waited_s:
            self._taken_then_bytes = self._taken_bytes
        self._paused_at_s = time.monotonic()
        self._drain_timer = self.loop.call_later(DRAIN_S - self._waited_s, self._look_at_rate)

    def resume_writing(self) -> None:
        """It has now."""
        if self._paused_at_s is not None:
            self._waited_s = min(self._waited_s + time.monotonic() - self._paused_at_s, DRAIN_S)
        self._stop_waiting()
        super().resume_writing()

    def _look_at_rate(self) -> None:
        if self._taken_bytes - self._taken_then_bytes < MIN_BYTES_PER_S * DRAIN_S:
            self.transport.abort()
            return
        self._waited_s = 0.0
        self.pause_writing()

    @property
    def _taken_bytes(self) -> int:
        """What the peer has taken of the files, and of what else waits for it: only differences mean anything."""
        waiting = self.transport.get_write_buffer_size() + _queued_bytes(self.transport.get_extra_info("socket"))
        return self.handed_bytes - waiting

    def _stop_waiting(self) -> None:
        self._paused_at_s = None
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def _forget_waiting(self) -> None:
        self._stop_waiting()
        self._waited_s = 0.0

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone."""
        self._head_arrived()
        self._forget_waiting()
        super().connection_lost(exc)


def bounded(at_once: AtOnce) -> type[BoundedHttp]:
    """The protocol of a server that may answer from these files at once."""

    class Answering(BoundedHttp):
        pass

    Answering.at_once = at_once
    return Answering


_NO_ROOM = cast(
    ASGI3Application,
    JSONResponse(
        {"error": {"message": "this node answers as many connections as it can; try again in a moment"}},
        503,
        {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"},
    ),
)


def _queued_bytes(transport_socket: Any) -> int:
    """Bytes that the kernel has for a peer, and the peer has not confirmed."""
    try:
        if sys.platform == "linux":
            return int(struct.unpack("i", fcntl.ioctl(transport_socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
        return int(transport_socket.getsockopt(socket.SOL_SOCKET, _SO_NWRITE))
    except OSError:  # closed by now
        return 0
