"""Send file content: ranges, rate limit, injected faults, and an exact count of sent bytes."""

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
# Bytes are counted per piece, so this bounds the error of the count when the client disconnects.
SEND_PIECE_BYTES = 1 << 16
# A rate-limited body is sent in at least this many pieces per second: smooth also at low rates.
MIN_PIECES_PER_S = 20

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class RangeNotSatisfiableError(Exception):
    """The range lies outside the file: answer 416."""


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return (first, last) of a single byte range, inclusive; None to send the whole file.

    A header with several ranges, or an invalid one, is ignored, as HTTP permits.
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


class BodyRateLimiter:
    """Limits the total rate of all bodies: each piece reserves its time after the last."""

    def __init__(self) -> None:
        self._free_at_s = 0.0

    def reserve(self, count_bytes: int, bytes_per_s: float, now_s: float) -> float:
        """Reserve time for a piece of `count_bytes`; return the seconds to wait before it may be sent."""
        self._free_at_s = max(self._free_at_s, now_s) + count_bytes / bytes_per_s
        return self._free_at_s - now_s


@dataclass(frozen=True)
class BodyPlan:
    """The bytes of a file to send, and the faults to inject."""

    disk_path: Path
    first: int
    length_bytes: int
    flip_at: int | None = None
    """Offset in the file of the byte to flip."""
    drop_after_bytes: int | None = None
    """Close the connection after this many bytes of the body."""


class FileBody(Response):
    """A response whose body is a range of a file, read in a worker thread."""

    def __init__(
        self,
        plan: BodyPlan,
        status_code: int,
        headers: dict[str, str],
        count_bytes: Callable[[int], None],
        rate_bytes_per_s: Callable[[], float | None],
        pacer: BodyRateLimiter,
    ) -> None:
        super().__init__(status_code=status_code, headers={**headers, "Content-Length": str(plan.length_bytes)})
        self._plan = plan
        self._count_bytes = count_bytes
        self._rate_bytes_per_s = rate_bytes_per_s
        self._pacer = pacer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send headers and body. An injected drop leaves the body incomplete; the server then closes."""
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
        """Send the body; return whether it is complete."""
        plan = self._plan
        to_send = plan.length_bytes if plan.drop_after_bytes is None else plan.drop_after_bytes
        sent_bytes = 0
        while sent_bytes < to_send:
            offset = plan.first + sent_bytes
            chunk_bytes = min(READ_CHUNK_BYTES, to_send - sent_bytes)
            chunk = await asyncio.to_thread(pread, file.fileno(), chunk_bytes, offset)
            if not chunk:
                # The file has shrunk since it was hashed: end the body incomplete.
                return False
            for piece in self._pieces(_flipped(chunk, offset, plan.flip_at)):
                await self._throttle(len(piece), gone)
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
                size_bytes = max(1, min(SEND_PIECE_BYTES, int(rate / MIN_PIECES_PER_S)))
            yield chunk[position : position + size_bytes]
            position += size_bytes

    async def _throttle(self, count_bytes: int, gone: asyncio.Event) -> None:
        """Wait until the piece may be sent, or the client has disconnected."""
        rate = self._rate_bytes_per_s()
        if rate is None:
            return
        delay_s = self._pacer.reserve(count_bytes, rate, asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(delay_s):
                await gone.wait()
        except TimeoutError:
            return


def _flipped(chunk: bytes, offset: int, flip_at: int | None) -> bytes:
    """Return the chunk at `offset` of its file, with the byte at `flip_at` inverted if it contains it."""
    if flip_at is None or not offset <= flip_at < offset + len(chunk):
        return chunk
    corrupt = bytearray(chunk)
    corrupt[flip_at - offset] ^= 0xFF
    return bytes(corrupt)


async def _watch_disconnect(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()
