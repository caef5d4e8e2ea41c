"""Where the body of a fileserver's answer goes: a leaf list into one piece, a run of leaves each into its buffer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import msgspec

from shoal_common.errors import Corrupt
from shoal_common.layout import LEAF_BYTES

BUFFERS_AHEAD = 24
"""Leaves in memory beyond one for each connection: received, and not verified and written yet."""
_AHEAD_OF_ONE = 4
"""Leaves in memory that one connection may have at most."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")


class Reply(msgspec.Struct, frozen=True):
    """The head of an answer; header names in lower case."""

    status: int
    headers: dict[str, str]

    @property
    def body_bytes(self) -> int:
        """How long the body is. Raises Corrupt where the head does not say."""
        said = self.headers.get("content-length", "0" if self.status == 204 else "")
        if not (said.isascii() and said.isdigit() and len(said) < 20) or "transfer-encoding" in self.headers:
            raise Corrupt("a node answered with a body of unknown length")
        return int(said)


class Landing(Protocol):
    """Where a body goes."""

    def begin(self, reply: Reply) -> None:
        """Look at the head of a 200 or 206. Raises Corrupt for one that does not belong to the question."""

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty while there are any to come."""

    def filled(self, count: int) -> None:
        """So many bytes have been put there."""

    def use(self, resume: Callable[[], None]) -> None:
        """Called once: call `resume` when `waits` has turned false again."""

    @property
    def waits(self) -> bool:
        """Whether there is no room for more bytes now."""

    @property
    def begun(self) -> bool:
        """Whether a head has come that it belongs to."""


class Whole:
    """A body that is wanted whole: a page of a leaf list."""

    def __init__(self, start: int, size_bytes: int) -> None:
        self.content = bytearray(size_bytes)
        self._start, self._at = start, 0
        self.begun = False

    def begin(self, reply: Reply) -> None:
        """Exactly what was asked for."""
        if reply.status == 206:
            first, last, _ = content_range(reply)
            if first != self._start or last + 1 - first != len(self.content):
                raise Corrupt("a node answered another range than it was asked for")
        elif self._start:
            raise Corrupt("a node answered all where it was asked for a part")
        if reply.body_bytes != len(self.content):
            raise Corrupt("a node answered more or less than it was asked for")
        self.begun = True

    def buffer(self) -> memoryview:
        """The rest."""
        return memoryview(self.content)[self._at :]

    def filled(self, count: int) -> None:
        """So much of it is there."""
        self._at += count

    def use(self, resume: Callable[[], None]) -> None:
        """It has room for all of it."""

    @property
    def waits(self) -> bool:
        """Never."""
        return False


class Buffers:
    """Memory for leaves, used again and again: fresh pages cost more than receiving into them.

    Each landing may always have one; more of them only while all together have less than `ahead` more.
    """

    def __init__(self, ahead: int = BUFFERS_AHEAD) -> None:
        self._ahead, self._free = ahead, list[bytearray]()
        self.out_count = self.most = 0
        """Leaves in memory now, and at most so far."""
        self._waiting: list[Callable[[], None]] = []

    def take(self, held_count: int) -> bytearray | None:
        """One more for who has `held_count`; None when it has to wait."""
        if held_count and (held_count >= _AHEAD_OF_ONE or self.out_count >= self._ahead):
            return None
        self.out_count += 1
        self.most = max(self.most, self.out_count)
        return self._free.pop() if self._free else bytearray(LEAF_BYTES)

    def give_back(self, buffer: bytearray) -> None:
        """It is not looked at any more."""
        self.out_count -= 1
        if len(self._free) < self._ahead:
            self._free.append(buffer)
        waiting, self._waiting = self._waiting, []
        for again in waiting:
            again()

    def when_free(self, again: Callable[[], None]) -> None:
        """Call this once when one has come back."""
        self._waiting.append(again)


Took = Callable[[int, memoryview, Callable[[], None]], None]
"""Takes a leaf that has come whole: its number, its bytes, and what to call when they are not needed any more."""


class Leaves:
    """A body that is a run of leaves. `fits(first, end)` says whether leaves [first, end) answer the question."""

    def __init__(self, size_bytes: int, fits: Callable[[int, int], bool], took: Took, buffers: Buffers) -> None:
        self._size, self._fits, self._took, self._buffers = size_bytes, fits, took, buffers
        self.first = self.end = 0
        """The run that the node has chosen, once it has answered."""
        self._leaf = self._at = self._held = 0
        self._buffer: bytearray | None = None
        self._resume: Callable[[], None] = lambda: None
        self._closed = self.begun = False

    def begin(self, reply: Reply) -> None:
        """A range of whole leaves that was asked for, of a blob of this size."""
        if reply.status == 206:
            start, last, total = content_range(reply)
        else:
            start, last, total = 0, self._size - 1, reply.body_bytes
        end = last + 1
        if total != self._size or start % LEAF_BYTES or not (end % LEAF_BYTES == 0 or end == total):
            raise Corrupt("a node answered a range that is not of whole leaves of this blob")
        self.first, self.end = start // LEAF_BYTES, -(-end // LEAF_BYTES)
        if not start < end <= total or end - start != reply.body_bytes or not self._fits(self.first, self.end):
            raise Corrupt("a node answered another range than it was asked for")
        self._leaf = self.first
        self.begun = True
        self._next()

    def _next(self) -> None:
        if self._buffer is None and self._leaf < self.end and not self._closed:
            self._buffer = self._buffers.take(self._held)
            if self._buffer is None:
                self._buffers.when_free(self._again)
            else:
                self._held += 1

    def _again(self) -> None:
        if self.waits:
            self._next()
            if not self.waits:
                self._resume()

    def buffer(self) -> memoryview:
        """The rest of the leaf."""
        assert self._buffer is not None
        return memoryview(self._buffer)[self._at : self._leaf_bytes()]

    def _leaf_bytes(self) -> int:
        return min(LEAF_BYTES, self._size - self._leaf * LEAF_BYTES)

    def filled(self, count: int) -> None:
        """So much more of the leaf is there; whole, it is passed on."""
        self._at += count
        size = self._leaf_bytes()
        if self._at < size:
            return
        leaf, buffer = self._leaf, self._buffer
        assert buffer is not None
        self._leaf, self._at, self._buffer = leaf + 1, 0, None

        def done() -> None:
            self._held -= 1
            self._buffers.give_back(buffer)

        self._took(leaf, memoryview(buffer)[:size], done)
        self._next()

    def close(self) -> None:
        """No more bytes come."""
        self._closed = True
        if self._buffer is not None:
            self._held -= 1
            buffer, self._buffer = self._buffer, None
            self._buffers.give_back(buffer)

    def use(self, resume: Callable[[], None]) -> None:
        """What to call when there is room again."""
        self._resume = resume

    @property
    def waits(self) -> bool:
        """Whether leaves have to be written before more can come."""
        return self._buffer is None and self._leaf < self.end and not self._closed


def content_range(reply: Reply) -> tuple[int, int, int]:
    """First byte, last byte and size that a 206 names. Raises Corrupt."""
    match = _CONTENT_RANGE.fullmatch(reply.headers.get("content-range", ""))
    if not match:
        raise Corrupt("a node answered a part and does not say which")
    return int(match[1]), int(match[2]), int(match[3])
