"""Sets of leaves, compared with sets of numbers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import BadInput
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.leaf_set import from_bitmap

SIZES = st.integers(1, 40 * LEAF_BYTES)


@st.composite
def blobs(draw: st.DrawFn) -> tuple[int, set[int]]:
    """A size, and some of its leaves."""
    size_bytes = draw(SIZES)
    return size_bytes, draw(st.sets(st.integers(0, leaf_count(size_bytes) - 1)))


def as_int(leaves: set[int]) -> int:
    return sum(1 << leaf for leaf in leaves)


@given(blobs())
def test_a_set_survives_conversion_to_ranges_and_to_a_bitmap(blob: tuple[int, set[int]]) -> None:
    size_bytes, leaves = blob
    ranges = leaf_set.to_ranges(as_int(leaves))
    assert {leaf for first, last in ranges for leaf in range(first, last)} == leaves
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ranges)), "joined, in order"
    assert leaf_set.from_ranges(ranges, size_bytes) == as_int(leaves)
    bitmap = Bitmap(size_bytes)
    for leaf in leaves:
        bitmap.add(leaf)
    assert from_bitmap(bitmap.to_bytes()) == as_int(leaves)
    assert leaf_set.byte_count(as_int(leaves), size_bytes) == bitmap.have_bytes


@given(SIZES)
def test_all_leaves_of_a_blob_have_its_bytes(size_bytes: int) -> None:
    assert leaf_set.byte_count(leaf_set.all_leaves(size_bytes), size_bytes) == size_bytes
    assert leaf_set.byte_count(0, size_bytes) == 0 and leaf_set.all_leaves(0) == 0


@given(st.integers(0, 20 * LEAF_BYTES), st.integers(0, 20 * LEAF_BYTES))
def test_the_leaves_that_cover_bytes_are_all_needed_and_enough(start: int, end: int) -> None:
    leaves = leaf_set.leaves_of_bytes(start, end)
    touched = range(start // LEAF_BYTES, (end - 1) // LEAF_BYTES + 1) if start < end else range(0)
    assert leaves == as_int(set(touched))


@pytest.mark.parametrize("ranges", [[[0]], [[0, 1, 2]], [[2, 2]], [[3, 1]], [[-1, 1]], [[0, 4]], [[5, 6]]])
def test_I10_ranges_that_a_blob_cannot_have_are_refused(ranges: list[list[int]]) -> None:
    with pytest.raises(BadInput):
        leaf_set.from_ranges(ranges, 3 * LEAF_BYTES)
