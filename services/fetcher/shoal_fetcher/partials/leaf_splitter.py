"""Splits a stream of bytes into leaves. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shoal_common.store.bitmap import LEAF_BYTES, leaf_count


class LeafSplitter:
    """Splits what a source sends in order, in chunks of any size, into the leaves of a blob."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._leaf, self._buffer = 0, bytearray()

    @property
    def leaf(self) -> int:
        """The next leaf."""
        return self._leaf

    def seek(self, offset: int) -> None:
        """Continue at this offset, a leaf boundary. Bytes of an unfinished leaf are dropped."""
        assert offset % LEAF_BYTES == 0
        self._leaf = offset // LEAF_BYTES
        self._buffer.clear()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Add the next bytes; yield each leaf they complete, with its number."""
        self._buffer += data
        while self._buffer and self._leaf < leaf_count(self.size_bytes):
            size = min(LEAF_BYTES, self.size_bytes - self._leaf * LEAF_BYTES)
            if len(self._buffer) < size:
                return
            leaf_data = bytes(self._buffer[:size])
            del self._buffer[:size]
            self._leaf += 1
            yield self._leaf - 1, leaf_data

    @property
    def has_excess(self) -> bool:
        """Whether the source sends more bytes than the blob has."""
        return bool(self._buffer) and self._leaf >= leaf_count(self.size_bytes)
