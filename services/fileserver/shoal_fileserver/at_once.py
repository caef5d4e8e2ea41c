"""The answers that take no waiting: a leaf of a blob that was asked for a moment ago and is in the page cache.

All else goes through threads, because a disk may be slow; and through tasks and ASGI. For 1 MiB that costs more than
the sending itself. Files stay open for seconds here, and only as long as they are still what has the blob's name and
proof: a deleted blob's space must come free.
"""

from __future__ import annotations

import asyncio
import os
import time
from io import FileIO
from pathlib import Path

import msgspec

from shoal_common import clock
from shoal_common.credentials import blob_token_shows
from shoal_common.layout import LEAF_BYTES, Layout
from shoal_common.pace import Pace
from shoal_fileserver.contents import Content
from shoal_fileserver.ranges import Part, parse_range
from shoal_fileserver.sent import Sent

PREFIX = b"/v1/blobs/"
MAX_FILES = 32
SWEEP_S = 1.0
KEPT_S = 5.0
_PROBE_BYTES = 256 << 10
_NOWAIT = getattr(os, "RWF_NOWAIT", None)
"""Only Linux says whether a read would wait for the disk: elsewhere nothing is answered at once."""
_TYPE = b"content-type: application/octet-stream\r\n"


class Leaf(msgspec.Struct):
    """An answer: its head, and bytes [start, end) of a file, which is open until the event loop's next turn."""

    head: bytes
    fd: int
    start: int
    end: int


class _Open(msgspec.Struct):
    """A blob's file, and what has to stay so."""

    file: FileIO
    path: Path
    stamp: tuple[int, int, int, int]
    size_bytes: int
    said: bytes
    used_at_s: float

    def is_as_it_was(self) -> bool:
        """Whether its name still leads to it, and nobody has written to it. By stat: the inode is in memory."""
        try:
            return _stamp(os.lstat(self.path)) == self.stamp
        except OSError:
            return False


class AtOnce:
    """The files that were asked for just now."""

    def __init__(self, layout: Layout, node: str, secret: str, sent: Sent, pace: Pace) -> None:
        self._layout, self._node, self._secret, self._sent, self._pace = layout, node, secret, sent, pace
        self._open: dict[bytes, _Open] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def keep(self, content: Content) -> None:
        """A blob of the store's own was asked for: more of it will be."""
        name, path = content.blob.encode(), self._layout.blob(content.blob)
        if _NOWAIT is None or content.ready is not None or name in self._open or len(self._open) >= MAX_FILES:
            return
        said = "".join(f"{k.lower()}: {v}\r\n" for k, v in content.headers.items()).encode() + _TYPE
        file = FileIO(os.dup(content.file.fileno()))
        stamp = _stamp(os.fstat(file.fileno()))
        kept = _Open(file, path, stamp, content.size_bytes, said, time.monotonic())
        if not kept.is_as_it_was():  # in a read-only root
            file.close()
            return
        self._open[name] = kept
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        long_ago_s = time.monotonic() - KEPT_S
        for name, kept in list(self._open.items()):
            if kept.used_at_s < long_ago_s or not kept.is_as_it_was():
                self._close(name)
        self._sweeping = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep) if self._open else None

    def _close(self, name: bytes) -> None:
        self._open.pop(name).file.close()

    def answer(self, url: bytes, headers: list[tuple[bytes, bytes]]) -> Leaf | None:
        """What to answer to a GET over a connection that stays; None: it takes longer, or is nothing so simple."""
        kept = self._open.get(url[len(PREFIX) :]) if url.startswith(PREFIX) else None
        if kept is None or self._pace.bytes_per_s is not None:
            return None
        asked: bytes | None = None
        shown: dict[str, str] = {}
        for name, value in headers:
            if name == b"range" and asked is None:
                asked = value
            elif name == b"authorization":
                shown["authorization"] = value.decode("latin-1")
            elif name in (b"range", b"if-range", b"expect", b"content-length", b"transfer-encoding", b"upgrade"):
                return None
        part = parse_range(asked.decode("latin-1"), kept.size_bytes) if asked else None
        if not isinstance(part, Part) or part.end - part.start > LEAF_BYTES:
            return None
        blob = url[len(PREFIX) :].decode()
        if not blob_token_shows(self._secret, self._node, blob, shown, clock.now_s()):
            return None
        if not kept.is_as_it_was():
            self._close(url[len(PREFIX) :])
            return None
        if not _in_memory(kept.file.fileno(), part.start, part.end):
            return None
        now_s = kept.used_at_s = time.monotonic()
        if not part.start % LEAF_BYTES:
            leaf = part.start // LEAF_BYTES
            if going := self._sent.asked(blob, leaf, leaf + 1, now_s):
                self._sent.ended(going, leaf + 1, now_s)
        length, size = part.end - part.start, kept.size_bytes
        where = b"content-range: bytes %d-%d/%d\r\ncontent-length: %d\r\n" % (part.start, part.end - 1, size, length)
        return Leaf(kept.said + where, kept.file.fileno(), part.start, part.end)


def _stamp(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _in_memory(fd: int, start: int, end: int) -> bool:
    """Whether bytes [start, end) are in the page cache, as far as some of them tell."""
    one = [bytearray(1)]
    try:
        return all(os.preadv(fd, one, at, _NOWAIT or 0) for at in (*range(start, end, _PROBE_BYTES), end - 1))
    except OSError:  # it would wait, or this file system cannot tell
        return False
