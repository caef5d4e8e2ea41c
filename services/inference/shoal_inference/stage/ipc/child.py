"""The child's end of the socketpair: lines in, lines out, bounded both ways."""

from __future__ import annotations

import asyncio
import socket

from shoal_common.messages import DECODE_ERRORS
from shoal_inference.stage.errors import BadControl
from shoal_inference.stage.ipc.messages import MAX_LINE_BYTES, FromChild, ToChild, decode_to_child, encode_line

MAX_UNREAD_BYTES = 32 * 1024 * 1024
"""A parent that leaves more than this unread is as good as gone."""
FLUSH_S = 2.0


class ParentGone(Exception):
    """The socketpair has no reader: there is nobody to work for."""


class Channel:
    """Messages from and to the parent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, control_fd: int) -> Channel:
        """Over an inherited descriptor."""
        return cls(*await asyncio.open_connection(sock=socket.socket(fileno=control_fd), limit=MAX_LINE_BYTES))

    async def receive(self) -> ToChild:
        """The next message; ParentGone at end of stream, BadControl for what does not decode."""
        try:
            line = await self._reader.readuntil(b"\n")
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ParentGone from error
        except asyncio.LimitOverrunError as error:
            raise BadControl(f"the parent sent a line longer than {MAX_LINE_BYTES} bytes") from error
        try:
            return decode_to_child(line)
        except DECODE_ERRORS as error:
            raise BadControl(f"a line from the parent does not decode: {error}") from error

    def emit(self, message: FromChild) -> None:
        """Send without waiting, so that a slow parent never holds up the ring."""
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            raise ParentGone
        self._writer.write(encode_line(message))

    async def flush(self) -> None:
        """Give the last words a moment to leave."""
        try:
            async with asyncio.timeout(FLUSH_S):
                self._writer.transport.set_write_buffer_limits(high=0)
                await self._writer.drain()
        except (TimeoutError, OSError):
            pass
