"""Read what a partial blob holds from its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.leaf_hash import HASH_BYTES
from shoal_common.store.leaf_set import from_bitmap, leaf_range, leaf_ranges, to_bitmap
from shoal_common.store.relay_bitmap import parse_relay_bitmap
from shoal_common.store.store_paths import StorePaths

UNKNOWN_HASH = bytes(HASH_BYTES)


def read_bitmap(directory: Path, size_bytes: int) -> Bitmap:
    """Return the durable leaves of a partial blob, without those past the end of its data. Blocking."""
    try:
        bitmap = Bitmap(size_bytes, (directory / "have").read_bytes())
        data_bytes = (directory / "data").stat().st_size
    except FileNotFoundError:
        return Bitmap(size_bytes)
    present = Bitmap(size_bytes)
    for leaf in range(bitmap.leaf_count):
        if leaf in bitmap and leaf * LEAF_BYTES + bitmap.leaf_bytes(leaf) <= data_bytes:
            present.add(leaf)
    return present


def resumable_bytes(layout: StorePaths, blob: str, size_bytes: int) -> int:
    """Return the bytes of a partial blob that a fetch resumes from: durable, or written in this boot. Blocking."""
    durable = from_bitmap(read_bitmap(layout.partial(blob), size_bytes).to_bytes())
    count = leaf_count(size_bytes)
    return Bitmap(
        size_bytes, to_bitmap(durable | (relayable_leaves(layout, blob, size_bytes) or 0), count)
    ).have_bytes


def relayable_leaves(layout: StorePaths, blob: str, size_bytes: int) -> int | None:
    """Return the leaves in `ready`; None if it is missing or of another boot."""
    try:
        bitmap = parse_relay_bitmap(layout.relay_bitmap(blob).read_bytes())
    except FileNotFoundError:
        return None
    return from_bitmap(bitmap.to_bytes()) if bitmap is not None and bitmap.size_bytes == size_bytes else None


def leaves_with_hash(hashes: bytes) -> int:
    """Return the leaves whose hash a list has."""
    known = 0
    for leaf in range(len(hashes) // HASH_BYTES):
        if hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] != UNKNOWN_HASH:
            known |= 1 << leaf
    return known


def each_leaf(leaves: int) -> Iterator[int]:
    for first, end in leaf_ranges(leaves):
        yield from range(first, end)


def first_leaves(leaves: int, count: int) -> int:
    """Return the first leaves of a set: one range of at most `count`."""
    for first, end in leaf_ranges(leaves):
        return leaf_range(first, min(end, first + count))
    return 0
