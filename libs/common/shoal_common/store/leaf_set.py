"""Sets of leaves as integers: one bit a leaf."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from shoal_common.errors import BadInput
from shoal_common.store.bitmap import LEAF_BYTES, leaf_count

LeafRanges = list[list[int]]
"""`[first, last)` pairs, in order."""


def all_leaves(size_bytes: int) -> int:
    """Return all leaves of a blob."""
    return leaf_range(0, leaf_count(size_bytes))


def leaves_of_bytes(start: int, end: int) -> int:
    """Return the leaves that contain bytes [start, end)."""
    return leaf_range(start // LEAF_BYTES, -(-end // LEAF_BYTES)) if start < end else 0


def from_ranges(ranges: Iterable[Sequence[int]], size_bytes: int) -> int:
    """Return the set of some ranges in a blob of `size_bytes`. Raises BadInput for leaves beyond its end (I10)."""
    leaves, count = 0, leaf_count(size_bytes)
    for pair in ranges:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= count:
            raise BadInput(f"{list(pair)[:4]} is not a range of leaves of a blob that has {count}")
        leaves |= leaf_range(pair[0], pair[1])
    return leaves


def to_ranges(leaves: int) -> LeafRanges:
    """Return a set as ranges, in order, adjacent ones joined."""
    return [[first, last] for first, last in leaf_ranges(leaves)]


def byte_count(leaves: int, size_bytes: int) -> int:
    """Return the bytes of these leaves in a blob of `size_bytes`, whose last leaf may be shorter."""
    count = leaf_count(size_bytes)
    short = count * LEAF_BYTES - size_bytes if count and leaves >> (count - 1) & 1 else 0
    return leaves.bit_count() * LEAF_BYTES - short


MAX_RANGE_LEAVES = 64
"""Maximum length of a range."""
MAX_SENT_COUNT = 64


def from_bitmap(bitmap: bytes | bytearray) -> int:
    """Return the set of a bitmap as `bitmap.Bitmap` writes it: bit i of byte i // 8, least significant first."""
    return int.from_bytes(bitmap, "little")


def to_bitmap(leaves: int, leaf_count: int) -> bytes:
    """Return a set as the bitmap of a blob with `leaf_count` leaves. Raises OverflowError for a leaf beyond them."""
    return leaves.to_bytes(-(-leaf_count // 8), "little")


def leaf_range(first: int, end: int) -> int:
    """Return the set of leaves [first, end); empty if end <= first."""
    return ((1 << (end - first)) - 1) << first if end > first else 0


def enclosing_range(leaves: int) -> tuple[int, int]:
    """Return the smallest [first, end) around a set; (0, 0) for an empty one."""
    return (lowest_bit(leaves), leaves.bit_length()) if leaves else (0, 0)


def leaf_ranges(leaves: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a set, in order, adjacent leaves joined."""
    while leaves:
        first = lowest_bit(leaves)
        # Adding 1 at a range's start carries to its end.
        end = lowest_bit(leaves + (1 << first))
        yield first, end
        leaves &= -1 << end


def random_leaf(leaves: int, draw: random.Random) -> int:
    """Return a random leaf of a set, all equally likely. Raises ValueError for an empty set."""
    place, below = draw.randrange(leaves.bit_count()), 0
    width = leaves.bit_length()
    while width > 1:
        half = width // 2
        lower = leaves & ((1 << half) - 1)
        if place < lower.bit_count():
            leaves, width = lower, half
        else:
            place -= lower.bit_count()
            leaves, below, width = leaves >> half, below + half, width - half
    return below


def aligned_range(leaf: int, leaves: int, max_leaves: int) -> tuple[int, int]:
    """Return the range [first, end) of a set that contains this leaf.

    It ends at multiples of `max_leaves`, so that ranges picked one after the other leave no fragments between them.
    """
    max_leaves = min(max(max_leaves, 1), MAX_RANGE_LEAVES)
    start = leaf // max_leaves * max_leaves
    cell = leaves >> start & ((1 << max_leaves) - 1)
    gaps, offset = ~cell, leaf - start
    below = gaps & ((1 << offset) - 1)
    return start + below.bit_length(), start + offset + min(lowest_bit(gaps >> offset), max_leaves - offset)


def least_sent_range(
    sent: Sequence[int], wanted: int, ready: int, max_leaves: int, draw: random.Random
) -> tuple[int, int] | None:
    """Return the range [first, end) that a source sends next: a random one of the leaves that it has sent least.

    `sent[n]` is the set of leaves that were sent, or are being sent, n times to anyone: the caller records a range as
    soon as it is chosen. `ready` is what can be sent; leaves that are in flight to anyone are better left out,
    because their receiver will relay them before a second copy could arrive. At random, so that several sources do
    not all start with the same leaves. None if nothing wanted is ready.
    """
    for leaves in sent:
        if least := leaves & wanted & ready:
            return aligned_range(random_leaf(least, draw), least, max_leaves)
    return None


def record_sent(sent: list[int], leaves: int) -> None:
    """Record leaves as sent once more in `sent`, as `least_sent_range` reads it, up to MAX_SENT_COUNT times."""
    for count in range(min(len(sent), MAX_SENT_COUNT) - 1, -1, -1):
        if again := sent[count] & leaves:
            if count + 1 == len(sent):
                sent.append(0)
            sent[count] &= ~again
            sent[count + 1] |= again


def lowest_bit(leaves: int) -> int:
    return (leaves & -leaves).bit_length() - 1
