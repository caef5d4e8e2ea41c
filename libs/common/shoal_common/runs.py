"""Sets of leaves as numbers, runs of them, and which run a source sends next. Pure.

A set of leaves is an int: bit i is leaf i. Union, intersection and counting then take microseconds for thousands of
leaves. A run is leaves [first, end), one after the other in the file: what one request asks for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

MAX_RUN_LEAVES = 64
"""No run is longer."""
MAX_SENT_COUNT = 64


def from_bitmap(bitmap: bytes | bytearray) -> int:
    """The set that a bitmap holds, as `layout.Bitmap` writes it: bit i of byte i // 8, least significant first."""
    return int.from_bytes(bitmap, "little")


def to_bitmap(leaves: int, leaf_count: int) -> bytes:
    """A set as the bitmap of a blob with so many leaves. Raises OverflowError when it holds a leaf beyond them."""
    return leaves.to_bytes(-(-leaf_count // 8), "little")


def run(first: int, end: int) -> int:
    """The set of leaves [first, end); empty when there are none."""
    return ((1 << (end - first)) - 1) << first if end > first else 0


def bounds(leaves: int) -> tuple[int, int]:
    """The smallest [first, end) around a set: of a run, its own. (0, 0) of none."""
    return (_lowest(leaves), leaves.bit_length()) if leaves else (0, 0)


def runs_of(leaves: int) -> Iterator[tuple[int, int]]:
    """The runs of a set, in order, adjacent leaves joined."""
    while leaves:
        first = _lowest(leaves)
        # Adding 1 at a run's start carries to its end.
        end = _lowest(leaves + (1 << first))
        yield first, end
        leaves &= -1 << end


def drawn(leaves: int, draw: random.Random) -> int:
    """A leaf of a set, each as likely as the others. Raises ValueError for an empty set."""
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


def run_around(leaf: int, leaves: int, max_leaves: int) -> tuple[int, int]:
    """The run [first, end) of a set that has this leaf in it.

    It ends at multiples of `max_leaves`: runs drawn one after the other leave no splinters between them.
    """
    max_leaves = min(max(max_leaves, 1), MAX_RUN_LEAVES)
    start = leaf // max_leaves * max_leaves
    cell = leaves >> start & ((1 << max_leaves) - 1)
    gaps, at = ~cell, leaf - start
    below = gaps & ((1 << at) - 1)
    return start + below.bit_length(), start + at + min(_lowest(gaps >> at), max_leaves - at)


def least_sent(
    sent: Sequence[int], wanted: int, ready: int, max_leaves: int, draw: random.Random
) -> tuple[int, int] | None:
    """The run [first, end) that a source answers `any` with: of leaves that it has sent least, a random one.

    `sent[n]` is the set of leaves that were sent, or are being sent, n times to anyone: the caller counts a run as
    soon as it is chosen. `ready` is what can be sent; leaves that are on their way to somebody at this moment are
    better left out of it, because whoever gets them will pass them on before a second copy could arrive. At random,
    so that several sources do not all begin with the same leaves. None when nothing wanted is ready.
    """
    for leaves in sent:
        if least := leaves & wanted & ready:
            return run_around(drawn(least, draw), least, max_leaves)
    return None


def counted(sent: list[int], leaves: int) -> None:
    """Count leaves once more in `sent`, as `least_sent` reads it. After MAX_SENT_COUNT times nothing is counted."""
    for count in range(min(len(sent), MAX_SENT_COUNT) - 1, -1, -1):
        if again := sent[count] & leaves:
            if count + 1 == len(sent):
                sent.append(0)
            sent[count] &= ~again
            sent[count + 1] |= again


def _lowest(leaves: int) -> int:
    return (leaves & -leaves).bit_length() - 1
