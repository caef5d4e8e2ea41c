"""An HTTP connection that sends files: the head is the common protocol's, then sending takes the socket over.

A leaf in the page cache is answered from the head alone (`fast_path.py`); everything else by `sendfile.py`. Readers
have a minimum rate while the server waits for them. Inside TLS the bytes go through the transport.
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

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from shoal_common.http import bounded_protocol
from shoal_common.http.bounded_protocol import BoundedHttpProtocol
from shoal_fileserver.http.fast_path import FastPath
from shoal_fileserver.http.sendfile import FILE_SENDER_KEY, FileSender, send_now

_PARTIAL = b"HTTP/1.1 206 Partial Content\r\n"
_SO_NWRITE = 0x1024
"""macOS socket option: bytes in a socket's queue."""


class BulkHttpProtocol(BoundedHttpProtocol):
    """An HTTP connection of a server with this fast path, which sends everything else in these threads."""

    threads: Executor
    fast_path: FastPath

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sent_bytes = 0
        """Bytes of files given to the socket or the transport."""
        self._unsent: tuple[FileIO, int, int] | None = None
        self._waited_s = 0.0
        self._read_at_wait_start_bytes = 0
        self._drain_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Pause writing as soon as the socket takes no more: what follows is sent by sendfile, not from a buffer."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)

    def use_transport(self, transport: asyncio.Transport) -> None:
        """Pause writing as soon as encrypted bytes wait for the socket: at most two pieces of a file do."""
        super().use_transport(transport)
        transport.set_write_buffer_limits(1, 0)

    def answer_now(self) -> bool:
        """Send a leaf on the fast path; a task sends what the socket does not take."""
        if self.parser.get_method() != b"GET" or not self._idle or not self.parser.should_keep_alive():
            return False
        leaf = self.fast_path.respond(self.url, self.headers)
        if leaf is None or self.flow.write_paused or self.transport.is_closing():
            return False
        head = _PARTIAL + b"".join(b"%b: %b\r\n" % each for each in self.server_state.default_headers) + leaf.head
        rest = send_now(self, leaf, head + b"\r\n")
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
        if self._idle or self.is_secured:  # TLS has no half-closed connections
            return None
        self.cycle.keep_alive = False
        return True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        sending = cycle.scope["state"][FILE_SENDER_KEY] = FileSender(self, cycle)
        if self._unsent is not None:
            (file, start, end), self._unsent = self._unsent, None
            app = cast(ASGI3Application, partial(sending.send_rest, file, start, end))
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Finish a response."""
        self._reset_wait()
        super().on_response_complete()

    # The time in which the peer does not read is summed up, and its rate checked.

    def pause_writing(self) -> None:
        """Start a wait for a peer that has not read what was sent."""
        super().pause_writing()
        interval_s = bounded_protocol.RATE_CHECK_INTERVAL_S
        if self._waited_s >= interval_s:  # sum of short waits, each of which ended before its timer
            self._check_rate()
            return
        if not self._waited_s:
            self._read_at_wait_start_bytes = self._read_bytes
        self._drain_timer = self.loop.call_later(interval_s - self._waited_s, self._check_rate)

    def resume_writing(self) -> None:
        """End the wait."""
        if self._write_paused_at_s is not None:
            waited_s = self._waited_s + time.monotonic() - self._write_paused_at_s
            self._waited_s = min(waited_s, bounded_protocol.RATE_CHECK_INTERVAL_S)
        self._end_wait()
        super().resume_writing()

    def _check_rate(self) -> None:
        least_bytes = bounded_protocol.MIN_BYTES_PER_S * bounded_protocol.RATE_CHECK_INTERVAL_S
        if self._read_bytes - self._read_at_wait_start_bytes < least_bytes:
            self.transport.abort()
            return
        self._waited_s = 0.0
        self.pause_writing()

    @property
    def _read_bytes(self) -> int:
        """Bytes that the peer has read, up to a constant: only differences are meaningful."""
        queued_bytes = _queued_bytes(self.socket_transport.get_extra_info("socket"))
        return self.sent_bytes - self.unsent_bytes - queued_bytes

    def _end_wait(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def _reset_wait(self) -> None:
        self._end_wait()
        self._waited_s = 0.0
        self._write_paused_at_s = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Clean up."""
        self._reset_wait()
        super().connection_lost(exc)


def _queued_bytes(transport_socket: Any) -> int:
    """Return the bytes in the kernel's queue that the peer has not acknowledged."""
    try:
        if sys.platform == "linux":
            return int(struct.unpack("i", fcntl.ioctl(transport_socket.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
        return int(transport_socket.getsockopt(socket.SOL_SOCKET, _SO_NWRITE))
    except OSError:  # just closed
        return 0
