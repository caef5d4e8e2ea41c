"""Leaves, and the bitmap of those that are present."""

from __future__ import annotations

LEAF_BYTES = 1 << 20
"""The unit of verification and of resuming."""


def leaf_count(size_bytes: int) -> int:
    """Return the number of leaves of a blob."""
    return -(-size_bytes // LEAF_BYTES)


class Bitmap:
    """Durable leaves of a partial blob: bit i of byte i // 8, least significant first, is leaf i."""

    def __init__(self, size_bytes: int, data: bytes = b"") -> None:
        self.size_bytes = size_bytes
        self.leaf_count = leaf_count(size_bytes)
        expected = -(-self.leaf_count // 8)
        # A bitmap of another length belongs to a blob of another size: none of it can be trusted.
        self._bits = bytearray(data) if len(data) == expected else bytearray(expected)

    def add(self, leaf: int) -> None:
        """Record a leaf as durable."""
        self._bits[leaf // 8] |= 1 << (leaf % 8)

    def __contains__(self, leaf: int) -> bool:
        return bool(self._bits[leaf // 8] >> (leaf % 8) & 1)

    @property
    def complete(self) -> bool:
        """Whether all leaves are durable."""
        return all(leaf in self for leaf in range(self.leaf_count))

    def leaf_bytes(self, leaf: int) -> int:
        """Return the size of a leaf: 1 MiB, less for the last one."""
        return min(LEAF_BYTES, self.size_bytes - leaf * LEAF_BYTES)

    @property
    def have_bytes(self) -> int:
        """Bytes of the durable leaves."""
        return sum(self.leaf_bytes(leaf) for leaf in range(self.leaf_count) if leaf in self)

    def missing_ranges(self) -> list[tuple[int, int]]:
        """Return the byte ranges [start, end) still to fetch, in order, adjacent leaves joined."""
        runs: list[tuple[int, int]] = []
        for leaf in range(self.leaf_count):
            if leaf in self:
                continue
            start, end = leaf * LEAF_BYTES, leaf * LEAF_BYTES + self.leaf_bytes(leaf)
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        return runs

    def to_bytes(self) -> bytes:
        """Return the contents of the file `have`."""
        return bytes(self._bits)
