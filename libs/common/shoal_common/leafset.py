"""Sets of leaves (`runs.py`) of a blob of some size, and as they are written in messages and files. Pure.

There a set is ranges: `[[0, 3], [7, 8]]` are the leaves 0, 1, 2 and 7 (docs/sparse.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal_common.errors import BadInput
from shoal_common.layout import LEAF_BYTES, leaf_count
from shoal_common.runs import run, runs_of

Ranges = list[list[int]]
"""`[first, last)` pairs, in order."""


def whole(size_bytes: int) -> int:
    """All leaves of a blob."""
    return run(0, leaf_count(size_bytes))


def covering(start: int, end: int) -> int:
    """The leaves in which bytes [start, end) are."""
    return run(start // LEAF_BYTES, -(-end // LEAF_BYTES)) if start < end else 0


def of_ranges(ranges: Iterable[Sequence[int]], size_bytes: int) -> int:
    """The set that ranges name, of a blob of `size_bytes`. Raises BadInput for leaves that it has not (I10)."""
    found, count = 0, leaf_count(size_bytes)
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
            raise BadInput(f"{list(pair)[:4]} is no range of leaves of a blob that has {count}")
        found |= run(pair[0], pair[1])
    return found


def ranges(leaves: int) -> Ranges:
    """A set as ranges, in order, adjacent ones joined."""
    return [[first, last] for first, last in runs_of(leaves)]


def size_of(leaves: int, size_bytes: int) -> int:
    """Bytes of these leaves of a blob of `size_bytes`; its last one may be shorter than the others."""
    count = leaf_count(size_bytes)
    short = count * LEAF_BYTES - size_bytes if count and leaves >> (count - 1) & 1 else 0
    return leaves.bit_count() * LEAF_BYTES - short
