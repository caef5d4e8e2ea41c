"""HTTP connections that cannot hold the server up: bounded in number, heads in size and time, readers in slowness.

uvicorn bounds none of these by itself (its `limit_concurrency` would refuse honest peers while idle connections
fill it), so its protocol is extended where it is told of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shoal_fileserver.sending import SENDING, Sending

MAX_CONNECTIONS = 256
MAX_HEAD_BYTES = 32 << 10
HEAD_DEADLINE_S = 10.0
STALL_DEADLINE_S = 60.0
"""A peer that does not take 1 MiB, what is written at a time, in this long is cut off."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._idle_since_s = time.monotonic()
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for a request, for a while; make room if this is one connection too many."""
        super().connection_made(transport)
        # Writing is paused as soon as the socket takes no more: what follows comes by sendfile, past the buffer.
        transport.set_write_buffer_limits(0)
        self._expect_head()
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def _make_room(self) -> None:
        """Close the longest idle connection of the address that has the most; this one if all are busy."""
        everyone = [c for c in self.connections if isinstance(c, BoundedHttp)]
        from_host = Counter(c.host for c in everyone)
        idle = [c for c in everyone if c.idle and c is not self]
        victim = min(idle, key=lambda c: (-from_host[c.host], c._idle_since_s), default=self)
        # At once, not when its loss is noticed: the next newcomer must not choose the same one.
        self.connections.discard(victim)
        victim.transport.abort()

    @property
    def host(self) -> str:
        """Where it comes from."""
        return self.client[0] if self.client else ""

    def data_received(self, data: bytes) -> None:
        """Part of a request. A head that goes on and on is refused."""
        if self.idle and self._head_timer is None:
            self._expect_head()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """A request begins."""
        self._head_arrived()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        cycle.scope["state"][SENDING] = Sending(self.transport, self.flow, cycle)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """It has been answered."""
        self._idle_since_s = time.monotonic()
        super().on_response_complete()

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self.transport.abort)

    def _head_arrived(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        """The peer has not taken what was written."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_DEADLINE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It has now."""
        self._forget_stall()
        super().resume_writing()

    def _forget_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Gone."""
        self._head_arrived()
        self._forget_stall()
        super().connection_lost(exc)
