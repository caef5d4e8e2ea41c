"""Sinks for the body of a fileserver's answer: a leaf list into one buffer, a run of leaves into one buffer each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import msgspec

from shoal_common.errors import Corrupt
from shoal_common.store.bitmap import LEAF_BYTES

BUFFERS_AHEAD = 24
"""Leaves in memory beyond one per connection: received, and not yet verified and written."""
_MAX_LEAVES_PER_SINK = 4
"""Leaves in memory for one connection."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class PeerReply(msgspec.Struct, frozen=True):
    """The head of an answer; header names in lower case."""

    status: int
    headers: dict[str, str]

    @property
    def body_bytes(self) -> int:
        """Length of the body. Raises Corrupt if the head does not say."""
        length = self.headers.get("content-length", "0" if self.status == 204 else "")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or "transfer-encoding" in self.headers:
            raise Corrupt("a node sent a body of unknown length")
        return int(length)


class BodySink(Protocol):
    """Receives a body."""

    def begin(self, reply: PeerReply) -> None:
        """Check the head of a 200 or 206. Raises Corrupt if it does not answer the request."""

    def buffer(self) -> memoryview:
        """Return where the next bytes go; never empty while any are to come."""

    def advance(self, count: int) -> None:
        """Count bytes written there."""

    def on_resume(self, resume: Callable[[], None]) -> None:
        """Set the callback for when `waits` turns false; called once."""

    @property
    def is_waiting(self) -> bool:
        """Whether there is no free buffer now."""

    @property
    def has_begun(self) -> bool:
        """Whether a valid head has arrived."""


class BytesSink:
    """Receives a body into one buffer: a page of a leaf list."""

    def __init__(self, start: int, size_bytes: int) -> None:
        self.content = bytearray(size_bytes)
        self._start, self._offset = start, 0
        self.has_begun = False

    def begin(self, reply: PeerReply) -> None:
        """Accept exactly the requested range."""
        if reply.status == 206:
            first, last, _ = content_range(reply)
            if first != self._start or last + 1 - first != len(self.content):
                raise Corrupt("a node sent another range than requested")
        elif self._start:
            raise Corrupt("a node sent the whole list where a range was requested")
        if reply.body_bytes != len(self.content):
            raise Corrupt("a node sent another number of bytes than requested")
        self.has_begun = True

    def buffer(self) -> memoryview:
        """Return the unfilled rest."""
        return memoryview(self.content)[self._offset :]

    def advance(self, count: int) -> None:
        """Count bytes written."""
        self._offset += count

    def on_resume(self, resume: Callable[[], None]) -> None:
        """Ignored: this sink never waits."""

    @property
    def is_waiting(self) -> bool:
        """Never."""
        return False


class BufferPool:
    """Reusable memory for leaves: fresh pages cost more than receiving into them.

    Each sink may always have one buffer; more only while all together have fewer than `ahead`.
    """

    def __init__(self, ahead: int = BUFFERS_AHEAD) -> None:
        self._ahead, self._free = ahead, list[bytearray]()
        self.out_count = self.max_out_count = 0
        """Leaves in memory now, and the most so far."""
        self._waiting: list[Callable[[], None]] = []

    def take(self, held_count: int) -> bytearray | None:
        """Return a buffer for a sink that has `held_count`; None if it has to wait."""
        if held_count and (held_count >= _MAX_LEAVES_PER_SINK or self.out_count >= self._ahead):
            return None
        self.out_count += 1
        self.max_out_count = max(self.max_out_count, self.out_count)
        return self._free.pop() if self._free else bytearray(LEAF_BYTES)

    def put_back(self, buffer: bytearray) -> None:
        """Return a buffer to the pool."""
        self.out_count -= 1
        if len(self._free) < self._ahead:
            self._free.append(buffer)
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()

    def when_free(self, callback: Callable[[], None]) -> None:
        """Call this once, when a buffer has been returned."""
        self._waiting.append(callback)


OnLeaf = Callable[[int, memoryview, Callable[[], None]], None]
"""Called with a complete leaf: its number, its bytes, and what to call when they are not needed any more."""


class LeafSink:
    """Receives a run of leaves. `fits(first, end)` returns whether leaves [first, end) answer the request."""

    def __init__(self, size_bytes: int, fits: Callable[[int, int], bool], took: OnLeaf, buffers: BufferPool) -> None:
        self._size, self._fits, self._took, self._buffers = size_bytes, fits, took, buffers
        self.first = self.end = 0
        """The run that the node chose, once it has answered."""
        self._leaf = self._offset = self._held = 0
        self._buffer: bytearray | None = None
        self._resume: Callable[[], None] = lambda: None
        self._closed = self.has_begun = False

    def begin(self, reply: PeerReply) -> None:
        """Accept a requested range of whole leaves, of a blob of this size."""
        if reply.status == 206:
            start, last, total = content_range(reply)
        else:
            start, last, total = 0, self._size - 1, reply.body_bytes
        end = last + 1
        if total != self._size or start % LEAF_BYTES or not (end % LEAF_BYTES == 0 or end == total):
            raise Corrupt("a node sent a range that is not of whole leaves of this blob")
        self.first, self.end = start // LEAF_BYTES, -(-end // LEAF_BYTES)
        if not start < end <= total or end - start != reply.body_bytes or not self._fits(self.first, self.end):
            raise Corrupt("a node sent another range than requested")
        self._leaf = self.first
        self.has_begun = True
        self._take_buffer()

    def _take_buffer(self) -> None:
        if self._buffer is None and self._leaf < self.end and not self._closed:
            self._buffer = self._buffers.take(self._held)
            if self._buffer is None:
                self._buffers.when_free(self._on_buffer_free)
            else:
                self._held += 1

    def _on_buffer_free(self) -> None:
        if self.is_waiting:
            self._take_buffer()
            if not self.is_waiting:
                self._resume()

    def buffer(self) -> memoryview:
        """Return the unfilled rest of the leaf."""
        assert self._buffer is not None
        return memoryview(self._buffer)[self._offset : self._leaf_bytes()]

    def _leaf_bytes(self) -> int:
        return min(LEAF_BYTES, self._size - self._leaf * LEAF_BYTES)

    def advance(self, count: int) -> None:
        """Count bytes written; a complete leaf is passed on."""
        self._offset += count
        size = self._leaf_bytes()
        if self._offset < size:
            return
        leaf, buffer = self._leaf, self._buffer
        assert buffer is not None
        self._leaf, self._offset, self._buffer = leaf + 1, 0, None

        def done() -> None:
            self._held -= 1
            self._buffers.put_back(buffer)

        self._took(leaf, memoryview(buffer)[:size], done)
        self._take_buffer()

    def close(self) -> None:
        """Return the buffer: no more bytes come."""
        self._closed = True
        if self._buffer is not None:
            self._held -= 1
            buffer, self._buffer = self._buffer, None
            self._buffers.put_back(buffer)

    def on_resume(self, resume: Callable[[], None]) -> None:
        """Set the callback for when a buffer is free again."""
        self._resume = resume

    @property
    def is_waiting(self) -> bool:
        """Whether leaves must be written before more can be received."""
        return self._buffer is None and self._leaf < self.end and not self._closed


def content_range(reply: PeerReply) -> tuple[int, int, int]:
    """Return first byte, last byte and size of a 206. Raises Corrupt."""
    match = _CONTENT_RANGE.fullmatch(reply.headers.get("content-range", ""))
    if not match:
        raise Corrupt("a node sent a 206 without a valid Content-Range")
    return int(match[1]), int(match[2]), int(match[3])
