"""Sends bytes of a file over a connection without copying them: sendfile, in threads, because a disk may be slow.

uvicorn has no sendfile: its request cycle is told afterwards how much of the body was sent. What the socket does not
take is buffered in its transport, one chunk at a time, whose flow control says when to continue. Inside TLS threads
read pieces, and the transport encrypts them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from socket import IPPROTO_TCP
from typing import TYPE_CHECKING, Any

from shoal_common.concurrency.cancellation import run_to_completion
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_fileserver.http.fast_path import NOWAIT

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from shoal_fileserver.http.fast_path import LeafResponse
    from shoal_fileserver.http.protocol import FileConnection

FILE_SENDER_KEY = "shoal.sending"
"""Key of a request's `FileSender` in its state."""
_PUSH_BYTES = 8 * LEAF_BYTES
"""Maximum to send before anything else is checked."""
_CHUNK_BYTES = 64 << 10
_TLS_PIECE_BYTES = 256 << 10
"""What is read before it is encrypted: encrypting it holds up the event loop for some 0.1 ms."""
_LIMITED_SHARE_S = 0.1
_MIN_SHARE_BYTES = 16 << 10
_TCP_CORK = 3
"""Linux's; the fast path exists only there."""


class FileSender:
    """Sends one response's body to the peer."""

    def __init__(self, connection: FileConnection, cycle: RequestResponseCycle) -> None:
        self._connection, self._cycle = connection, cycle
        self._transport, self._flow = connection.transport, connection.flow

    @property
    def disconnected(self) -> bool:
        """Whether the peer has disconnected."""
        return self._cycle.disconnected or self._transport.is_closing()

    def abort(self) -> None:
        """Close the connection: the missing bytes tell the peer that the response is incomplete."""
        self._transport.abort()

    async def send_file(
        self, file: FileIO, start: int, end: int, limiter: RateLimiter, is_gone: Callable[[], bool]
    ) -> int:
        """Send bytes [start, end) of a file after the response's head. Returns how many were sent.

        Fewer if the peer disconnects, the file has become shorter, or `is_gone` (called in a thread) returns true.
        """
        loop, position, allowed = asyncio.get_running_loop(), start, start
        push = _read_piece if self._connection.is_secured else _push
        # A duplicate: the transport may close its descriptor at any moment, and another connection reuse the number.
        socket = os.dup(self._transport.get_extra_info("socket").fileno())
        try:
            while position < end:
                if self._flow.write_paused:
                    await self._flow.drain()
                if self.disconnected:
                    break
                if position >= allowed:
                    share = min(_share_bytes(limiter), end - position)
                    await limiter.acquire(share)
                    allowed = position + share
                    continue  # the peer may have disconnected meanwhile
                # To its end, even if cancelled: the socket and the file are closed afterwards.
                sent, rest = await run_to_completion(
                    loop.run_in_executor(self._connection.threads, push, socket, file, position, allowed, is_gone)
                )
                position += sent
                self._connection.sent_bytes += sent
                if rest and not self.disconnected:
                    position += len(rest)
                    self._connection.sent_bytes += len(rest)
                    self._transport.write(rest)
                elif not sent:
                    break
        finally:
            os.close(socket)
        self._cycle.expected_content_length -= position - start
        return position - start

    async def send_rest(self, file: FileIO, start: int, end: int, *application: Any) -> None:
        """Send the rest of a body whose head is sent, as an ASGI application. Closes the file."""
        _, _, send = application
        cycle = self._cycle
        cycle.response_started, cycle.chunked_encoding, cycle.expected_content_length = True, False, end - start
        with file:
            if await self.send_file(file, start, end, RateLimiter(), lambda: False) < end - start:
                self.abort()
            else:
                await send({"type": "http.response.body"})


def send_now(connection: FileConnection, leaf: LeafResponse, head: bytes) -> int:
    """Send a head and its leaf as far as the socket takes them now. Returns the offset of the rest."""
    if connection.is_secured:
        return _encrypt_now(connection, leaf, head)
    transport = connection.transport
    socket = transport.get_extra_info("socket")
    descriptor, position = socket.fileno(), leaf.start
    try:
        socket.setsockopt(IPPROTO_TCP, _TCP_CORK, 1)  # saves a packet, and waking the peer once
        written = 0
        with suppress(BlockingIOError):
            written = os.write(descriptor, head)
            while (
                written == len(head)
                and position < leaf.end
                and (sent := os.sendfile(descriptor, leaf.fd, position, leaf.end - position))
            ):
                position += sent
        socket.setsockopt(IPPROTO_TCP, _TCP_CORK, 0)
        if written < len(head):
            transport.write(head[written:])
    except OSError:
        transport.abort()
    return position


def _encrypt_now(connection: FileConnection, leaf: LeafResponse, head: bytes) -> int:
    position = leaf.start
    with suppress(OSError):  # no longer in the page cache: a thread reads the rest
        while position < leaf.end and not connection.flow.write_paused:
            buffer = bytearray(min(_TLS_PIECE_BYTES, leaf.end - position))
            count = os.preadv(leaf.fd, [buffer], position, NOWAIT)
            if not count:
                break
            connection.transport.writelines([head, memoryview(buffer)[:count]])
            head, position = b"", position + count
    if head:
        connection.transport.write(head)
    return position


def _share_bytes(limiter: RateLimiter) -> int:
    """Return how much to take of a rate limit at a time: little, so that its sharers take turns."""
    if limiter.bytes_per_s is None:
        return _PUSH_BYTES
    return min(max(int(limiter.bytes_per_s * _LIMITED_SHARE_S), _MIN_SHARE_BYTES), LEAF_BYTES)


def _push(socket: int, file: FileIO, start: int, end: int, is_gone: Callable[[], bool]) -> tuple[int, bytes]:
    """Send what a socket takes of bytes [start, end); return the count, and the next chunk if it takes no more."""
    position = start
    if is_gone():
        return 0, b""
    with suppress(OSError):  # the peer has disconnected, or the disk cannot be read: the missing bytes tell
        while position < end:
            try:
                sent = os.sendfile(socket, file.fileno(), position, end - position)
            except BlockingIOError:
                return position - start, os.pread(file.fileno(), min(_CHUNK_BYTES, end - position), position)
            if not sent:
                break
            position += sent
    return position - start, b""


def _read_piece(_: int, file: FileIO, start: int, end: int, is_gone: Callable[[], bool]) -> tuple[int, bytes]:
    """Read the next piece of bytes [start, end) for a transport that encrypts it; nothing if the disk cannot."""
    with suppress(OSError):
        if not is_gone():
            return 0, os.pread(file.fileno(), min(_TLS_PIECE_BYTES, end - start), start)
    return 0, b""
