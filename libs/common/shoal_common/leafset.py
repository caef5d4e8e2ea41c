"""Sets of leaves (`leaf_set.py`) of a blob of known size, and their form in messages and files. Pure.

In messages and files a set is a list of ranges: `[[0, 3], [7, 8]]` are the leaves 0, 1, 2 and 7 (docs/sparse.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal_common.errors import BadInput
from shoal_common.layout import LEAF_BYTES, leaf_count
from shoal_common.runs import run, runs_of

Ranges = list[list[int]]
"""`[first, last)` pairs, in order."""


def whole(size_bytes: int) -> int:
    """Return all leaves of a blob."""
    return run(0, leaf_count(size_bytes))


def covering(start: int, end: int) -> int:
    """Return the leaves that contain bytes [start, end)."""
    return run(start // LEAF_BYTES, -(-end // LEAF_BYTES)) if start < end else 0


def of_ranges(ranges: Iterable[Sequence[int]], size_bytes: int) -> int:
    """Return the set of some ranges in a blob of `size_bytes`. Raises BadInput for leaves beyond its end (I10)."""
    leaves, count = 0, leaf_count(size_bytes)
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
            raise BadInput(f"{list(pair)[:4]} is not a range of leaves of a blob that has {count}")
        leaves |= run(pair[0], pair[1])
    return leaves


def ranges(leaves: int) -> Ranges:
    """Return a set as ranges, in order, adjacent ones joined."""
    return [[first, last] for first, last in runs_of(leaves)]


def size_of(leaves: int, size_bytes: int) -> int:
    """Return the bytes of these leaves in a blob of `size_bytes`, whose last leaf may be shorter."""
    count = leaf_count(size_bytes)
    short = count * LEAF_BYTES - size_bytes if count and leaves >> (count - 1) & 1 else 0
    return leaves.bit_count() * LEAF_BYTES - short
