"""Sending the bytes of a file: ranges, pacing, faults of the body, and the exact count of what went out."""

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import pread
from pathlib import Path
from typing import BinaryIO

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

READ_CHUNK_BYTES = 1 << 20
# Bytes are counted piece by piece, so this bounds how wrong a count can be when the client goes away.
SEND_PIECE_BYTES = 1 << 16
# A paced body is sent in at least so many pieces per second: smooth also when the rate is low.
PACED_PIECES_PER_S = 20

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class RangeNotSatisfiableError(Exception):
    """The range lies outside of the file: answer 416."""


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """(first, last) of a single byte range, last included; None when the whole file is to be sent.

    A header that asks for several ranges, or that makes no sense, is ignored, as HTTP permits.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or not any(match.groups()):
        return None
    first_text, last_text = match.groups()
    if not first_text:
        suffix_bytes = int(last_text)
        if suffix_bytes == 0 or size_bytes == 0:
            raise RangeNotSatisfiableError
        return max(0, size_bytes - suffix_bytes), size_bytes - 1
    first = int(first_text)
    if last_text and int(last_text) < first:
        return None
    if first >= size_bytes:
        raise RangeNotSatisfiableError
    return first, min(int(last_text) if last_text else size_bytes - 1, size_bytes - 1)


class Pacer:
    """Shares one rate among all bodies: each piece books its time on one line."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    def book(self, count_bytes: int, bytes_per_s: float, now_s: float) -> float:
        """Seconds to wait before a piece of `count_bytes` may count as sent."""
        self._free_at_s = max(self._free_at_s, now_s) + count_bytes / bytes_per_s
        return self._free_at_s - now_s


@dataclass(frozen=True)
class BodyPlan:
    """Which bytes of which file to send, and what shall go wrong with them."""

    disk_path: Path
    first: int
    length_bytes: int
    flip_at: int | None = None
    """Offset in the file of the byte to flip."""
    drop_after_bytes: int | None = None
    """Close the connection after so many bytes of this body."""


class FileBody(Response):
    """A response with a part of a file as its body, read in a worker thread."""

    def __init__(
        self,
        plan: BodyPlan,
        status_code: int,
        headers: dict[str, str],
        count_bytes: Callable[[int], None],
        rate_bytes_per_s: Callable[[], float | None],
        pacer: Pacer,
    ) -> None:
        super().__init__(status_code=status_code, headers={**headers, "Content-Length": str(plan.length_bytes)})
        self._plan = plan
        self._count_bytes = count_bytes
        self._rate_bytes_per_s = rate_bytes_per_s
        self._pacer = pacer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send head and body. A body that is cut off is simply left incomplete: the server then closes."""
        file = await asyncio.to_thread(self._plan.disk_path.open, "rb", 0)
        gone = asyncio.Event()
        watcher = asyncio.create_task(_watch_disconnect(receive, gone))
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers},
            )
            if await self._send_body(file, send, gone):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            file.close()
            watcher.cancel()

    async def _send_body(self, file: BinaryIO, send: Send, gone: asyncio.Event) -> bool:
        """Send the bytes; True when all of them went out."""
        plan = self._plan
        to_send = plan.length_bytes if plan.drop_after_bytes is None else plan.drop_after_bytes
        sent_bytes = 0
        while sent_bytes < to_send:
            offset = plan.first + sent_bytes
            wanted_bytes = min(READ_CHUNK_BYTES, to_send - sent_bytes)
            chunk = await asyncio.to_thread(pread, file.fileno(), wanted_bytes, offset)
            if not chunk:
                # The file has shrunk since it was hashed: an incomplete body is the only honest answer left.
                return False
            for piece in self._pieces(_flipped(chunk, offset, plan.flip_at)):
                await self._pace(len(piece), gone)
                if gone.is_set():
                    return False
                message: Message = {"type": "http.response.body", "body": piece, "more_body": True}
                await send(message)
                if gone.is_set():
                    return False
                self._count_bytes(len(piece))
                sent_bytes += len(piece)
        return to_send == plan.length_bytes

    def _pieces(self, chunk: bytes) -> Iterator[bytes]:
        position = 0
        while position < len(chunk):
            rate = self._rate_bytes_per_s()
            size_bytes = SEND_PIECE_BYTES
            if rate is not None:
                size_bytes = max(1, min(SEND_PIECE_BYTES, int(rate / PACED_PIECES_PER_S)))
            yield chunk[position : position + size_bytes]
            position += size_bytes

    async def _pace(self, count_bytes: int, gone: asyncio.Event) -> None:
        """Wait until the piece may go, but not for a client that has left."""
        rate = self._rate_bytes_per_s()
        if rate is None:
            return
        delay_s = self._pacer.book(count_bytes, rate, asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(delay_s):
                await gone.wait()
        except TimeoutError:
            return


def _flipped(chunk: bytes, offset: int, flip_at: int | None) -> bytes:
    """The chunk that starts at `offset` of its file, with the byte at `flip_at` inverted if it is in there."""
    if flip_at is None or not offset <= flip_at < offset + len(chunk):
        return chunk
    wrong = bytearray(chunk)
    wrong[flip_at - offset] ^= 0xFF
    return bytes(wrong)


async def _watch_disconnect(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
