"""The fast path: responses without waiting, for a leaf of a recently requested blob that is in the page cache.

All other requests go through threads, because a disk may be slow, and through tasks and ASGI. For 1 MiB that costs
more than the sending itself. Files stay open here for seconds, and only while they still have the blob's name and
stamp: a deleted blob's space must be freed.
"""

from __future__ import annotations

import asyncio
import os
import time
from io import FileIO
from pathlib import Path

import msgspec

from shoal_common.bus import cluster_clock
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.store_paths import StorePaths
from shoal_fileserver.blob_content import BlobContent
from shoal_fileserver.http.ranges import ByteRange, parse_range
from shoal_fileserver.send_history import SendHistory

PREFIX = b"/v1/blobs/"
MAX_FILES = 32
SWEEP_INTERVAL_S = 1.0
IDLE_CLOSE_S = 5.0
_PROBE_BYTES = 256 << 10
NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)
"""Only Linux says whether a read would wait for the disk: elsewhere there is no fast path."""
_TYPE = b"content-type: application/octet-stream\r\n"


class LeafResponse(msgspec.Struct):
    """A response: its head, and bytes [start, end) of a file that stays open until the event loop's next turn."""

    head: bytes
    fd: int
    start: int
    end: int


class _OpenBlob(msgspec.Struct):
    """A blob's open file, and the stat that it must keep."""

    file: FileIO
    path: Path
    stamp: tuple[int, int, int, int]
    size_bytes: int
    headers: bytes
    used_at_s: float

    def is_unchanged(self) -> bool:
        """Return whether its name still leads to it and nobody has written to it; stats an inode in memory."""
        try:
            return _stamp(os.lstat(self.path)) == self.stamp
        except OSError:
            return False


class FastPath:
    """Open files of recently requested blobs."""

    def __init__(self, layout: StorePaths, tokens: PeerTokens, sent: SendHistory, limiter: RateLimiter) -> None:
        self._layout, self._tokens, self._sent, self._limiter = layout, tokens, sent, limiter
        self._open: dict[bytes, _OpenBlob] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def keep_open(self, content: BlobContent) -> None:
        """Keep a requested blob of the store open: more requests for it will follow."""
        name, path = content.blob.encode(), self._layout.blob(content.blob)
        if not NOWAIT or content.relayable is not None or name in self._open or len(self._open) >= MAX_FILES:
            return
        header_lines = "".join(f"{k.lower()}: {v}\r\n" for k, v in content.headers.items()).encode() + _TYPE
        file = FileIO(os.dup(content.file.fileno()))
        stamp = _stamp(os.fstat(file.fileno()))
        entry = _OpenBlob(file, path, stamp, content.size_bytes, header_lines, time.monotonic())
        if not entry.is_unchanged():  # a library's file
            file.close()
            return
        self._open[name] = entry
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, self._sweep)

    def _sweep(self) -> None:
        oldest_s = time.monotonic() - IDLE_CLOSE_S
        for name, entry in list(self._open.items()):
            if entry.used_at_s < oldest_s or not entry.is_unchanged():
                self._close(name)
        self._sweeping = asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, self._sweep) if self._open else None

    def _close(self, name: bytes) -> None:
        self._open.pop(name).file.close()

    def respond(self, url: bytes, headers: list[tuple[bytes, bytes]]) -> LeafResponse | None:
        """Return the response to a GET on a kept-alive connection; None if it takes longer or is less simple."""
        entry = self._open.get(url[len(PREFIX) :]) if url.startswith(PREFIX) else None
        if entry is None or self._limiter.bytes_per_s is not None:
            return None
        range_header: bytes | None = None
        credentials: dict[str, str] = {}
        for name, value in headers:
            if name == b"range" and range_header is None:
                range_header = value
            elif name == b"authorization":
                credentials["authorization"] = value.decode("latin-1")
            elif name in (b"range", b"if-range", b"expect", b"content-length", b"transfer-encoding", b"upgrade"):
                return None
        part = parse_range(range_header.decode("latin-1"), entry.size_bytes) if range_header else None
        if not isinstance(part, ByteRange) or part.end - part.start > LEAF_BYTES:
            return None
        blob = url[len(PREFIX) :].decode()
        if not self._tokens.allows(blob, credentials, cluster_clock.now_s()):
            return None
        if not entry.is_unchanged():
            self._close(url[len(PREFIX) :])
            return None
        if not _in_page_cache(entry.file.fileno(), part.start, part.end):
            return None
        now_s = entry.used_at_s = time.monotonic()
        if not part.start % LEAF_BYTES:
            leaf = part.start // LEAF_BYTES
            if in_flight := self._sent.record_requested(blob, leaf, leaf + 1, now_s):
                self._sent.record_finished(in_flight, leaf + 1, now_s)
        length, size = part.end - part.start, entry.size_bytes
        lines = b"content-range: bytes %d-%d/%d\r\ncontent-length: %d\r\n" % (part.start, part.end - 1, size, length)
        return LeafResponse(entry.headers + lines, entry.file.fileno(), part.start, part.end)


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _in_page_cache(fd: int, start: int, end: int) -> bool:
    """Return whether bytes [start, end) are in the page cache, judging by samples."""
    buffer = [bytearray(1)]
    try:
        return all(os.preadv(fd, buffer, offset, NOWAIT) for offset in (*range(start, end, _PROBE_BYTES), end - 1))
    except OSError:  # it would wait, or this file system cannot say
        return False
