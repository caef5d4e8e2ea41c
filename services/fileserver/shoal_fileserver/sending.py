"""Bytes of a file onto a connection without copying them: sendfile, in threads, for the disk may be slow.

uvicorn has no such thing: its cycle of a request is told afterwards how much of the body has gone. What the socket
does not take waits in its transport, one piece of it, whose flow control says when to go on.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from socket import IPPROTO_TCP
from typing import TYPE_CHECKING, Any

from shoal_common.layout import LEAF_BYTES
from shoal_common.pace import Pace

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from shoal_fileserver.at_once import Leaf
    from shoal_fileserver.connections import BoundedHttp

SENDING = "shoal.sending"
"""Where in a request's state its Sending is."""
_PUSH_BYTES = 8 * LEAF_BYTES
"""At most this is sent before anything else is looked at."""
_PIECE_BYTES = 64 << 10
_PACED_S = 0.1
_LEAST_PACED_BYTES = 16 << 10
_TCP_CORK = 3
"""Linux: only there is anything sent at once."""
_THREADS = ThreadPoolExecutor(8, "send")


class Sending:
    """The way to the peer, for one response."""

    def __init__(self, connection: BoundedHttp, cycle: RequestResponseCycle) -> None:
        self._connection, self._cycle = connection, cycle
        self._transport, self._flow = connection.transport, connection.flow

    @property
    def broken(self) -> bool:
        """Whether the peer has gone."""
        return self._cycle.disconnected or self._transport.is_closing()

    def abort(self) -> None:
        """Break off: the missing bytes tell the peer."""
        self._transport.abort()

    async def file(self, file: FileIO, start: int, end: int, pace: Pace, is_gone: Callable[[], bool]) -> int:
        """Send bytes [start, end) of a file after the response's head. Returns how many were sent.

        Fewer when the peer has gone, when the file is shorter than it was, or once `is_gone` (called in a thread).
        """
        at, allowed = start, start
        # Our own: the transport may close its descriptor at any moment, and another connection get that number.
        socket = os.dup(self._transport.get_extra_info("socket").fileno())
        try:
            while at < end:
                if self._flow.write_paused:
                    await self._flow.drain()
                if self.broken:
                    break
                if at >= allowed:
                    share = min(_share_bytes(pace), end - at)
                    await pace.take(share)
                    allowed = at + share
                    continue  # the peer may have gone meanwhile
                sent, rest = await _to_its_end(_THREADS.submit(_push, socket, file, at, allowed, is_gone))
                at += sent
                self._connection.handed_bytes += sent
                if rest and not self.broken:
                    at += len(rest)
                    self._connection.handed_bytes += len(rest)
                    self._transport.write(rest)
                elif not sent:
                    break
        finally:
            os.close(socket)
        self._cycle.expected_content_length -= at - start
        return at - start

    async def rest(self, file: FileIO, start: int, end: int, *application: Any) -> None:
        """An ASGI application: what is left of a body whose head has gone. Closes the file."""
        _, _, send = application
        cycle = self._cycle
        cycle.response_started, cycle.chunked_encoding, cycle.expected_content_length = True, False, end - start
        with file:
            if await self.file(file, start, end, Pace(), lambda: False) < end - start:
                self.abort()
            else:
                await send({"type": "http.response.body"})


def send_at_once(transport: asyncio.Transport, leaf: Leaf, head: bytes) -> int:
    """Send a head and the leaf that follows, as far as the socket takes them now. Returns where the rest begins."""
    socket = transport.get_extra_info("socket")
    number, at = socket.fileno(), leaf.start
    try:
        socket.setsockopt(IPPROTO_TCP, _TCP_CORK, 1)  # one packet, and one waking of the peer, less
        written = 0
        with suppress(BlockingIOError):
            written = os.write(number, head)
            while (
                written == len(head) and at < leaf.end and (sent := os.sendfile(number, leaf.fd, at, leaf.end - at))
            ):
                at += sent
        socket.setsockopt(IPPROTO_TCP, _TCP_CORK, 0)
        if written < len(head):
            transport.write(head[written:])
    except OSError:
        transport.abort()
    return at


def _share_bytes(pace: Pace) -> int:
    """How much is taken of a pace at a time: what it gives in a moment, so that its sharers take turns."""
    if pace.bytes_per_s is None:
        return _PUSH_BYTES
    return min(max(int(pace.bytes_per_s * _PACED_S), _LEAST_PACED_BYTES), LEAF_BYTES)


def _push(socket: int, file: FileIO, start: int, end: int, is_gone: Callable[[], bool]) -> tuple[int, bytes]:
    """What a socket takes now of bytes [start, end); and the piece that follows, when it takes no more."""
    at = start
    if is_gone():
        return 0, b""
    with suppress(OSError):  # the peer has gone, or the disk cannot read it: the missing bytes tell
        while at < end:
            try:
                sent = os.sendfile(socket, file.fileno(), at, end - at)
            except BlockingIOError:
                return at - start, os.pread(file.fileno(), min(_PIECE_BYTES, end - at), at)
            if not sent:
                break
            at += sent
    return at - start, b""


async def _to_its_end(working: Future[tuple[int, bytes]]) -> tuple[int, bytes]:
    """The result of a thread. Cancelled, this waits all the same: what the thread uses is closed afterwards."""
    waiting = asyncio.wrap_future(working)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        await asyncio.wait({waiting})
        raise
