"""Sets of leaves as integers behave like sets, and a source sends what it has sent least."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.leaf_set import (
    MAX_SENT_COUNT,
    aligned_range,
    enclosing_range,
    from_bitmap,
    leaf_range,
    leaf_ranges,
    least_sent_range,
    random_leaf,
    record_sent,
    to_bitmap,
)

COUNT = 150
SETS = st.sets(st.integers(0, COUNT - 1))
LENGTHS = st.integers(1, 64)


def as_number(leaves: set[int]) -> int:
    return sum(1 << leaf for leaf in leaves)


@given(SETS)
def test_a_leaf_set_equals_its_bitmap_in_the_store(leaves: set[int]) -> None:
    bitmap = Bitmap(COUNT * LEAF_BYTES)
    for leaf in leaves:
        bitmap.add(leaf)
    assert from_bitmap(bitmap.to_bytes()) == as_number(leaves)
    assert to_bitmap(as_number(leaves), COUNT) == bitmap.to_bytes()


@given(SETS)
def test_ranges_are_a_sets_leaves_joined_in_order(leaves: set[int]) -> None:
    runs = list(leaf_ranges(as_number(leaves)))
    assert [leaf for first, end in runs for leaf in range(first, end)] == sorted(leaves)
    assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(runs))
    assert sum(leaf_range(first, end) for first, end in runs) == as_number(leaves)
    assert enclosing_range(as_number(leaves)) == ((min(leaves), max(leaves) + 1) if leaves else (0, 0))


@given(SETS.filter(bool), st.integers(0))
def test_a_random_leaf_is_in_the_set_and_every_leaf_can_be_it(leaves: set[int], seed: int) -> None:
    assert random_leaf(as_number(leaves), random.Random(seed)) in leaves

    class Every(random.Random):
        def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
            assert start == len(leaves)
            return self.place

        place = 0

    draw, found = Every(), set()
    for draw.place in range(len(leaves)):
        found.add(random_leaf(as_number(leaves), draw))
    assert found == leaves


@given(SETS.filter(bool), LENGTHS, st.data())
def test_a_range_around_a_leaf_is_as_long_as_alignment_allows(
    leaves: set[int], max_leaves: int, data: st.DataObject
) -> None:
    leaf = data.draw(st.sampled_from(sorted(leaves)))
    first, end = aligned_range(leaf, as_number(leaves), max_leaves)
    assert first <= leaf < end and end - first <= max_leaves
    assert set(range(first, end)) <= leaves
    assert first % max_leaves == 0 or first - 1 not in leaves
    assert end % max_leaves == 0 or end not in leaves


@given(SETS, SETS, st.lists(st.integers(0, 3), min_size=COUNT, max_size=COUNT), LENGTHS, st.integers(0))
def test_a_source_sends_wanted_ready_leaves_it_has_sent_least(
    wanted: set[int], ready: set[int], counts: list[int], max_leaves: int, seed: int
) -> None:
    sent = [as_number({leaf for leaf, count in enumerate(counts) if count == n}) for n in range(4)]
    chosen = least_sent_range(sent, as_number(wanted), as_number(ready), max_leaves, random.Random(seed))
    able = wanted & ready
    if chosen is None:
        assert not able
        return
    leaves = set(range(*chosen))
    assert 0 < len(leaves) <= max_leaves and leaves <= able
    assert {counts[leaf] for leaf in leaves} == {min(counts[leaf] for leaf in able)}


@given(LENGTHS, st.integers(1, COUNT), st.integers(0))
def test_a_source_sends_every_leaf_once_before_any_twice(max_leaves: int, count: int, seed: int) -> None:
    sent, draw, everything = [leaf_range(0, count)], random.Random(seed), leaf_range(0, count)
    while sent[0]:
        assert len(sent) <= 2
        chosen = least_sent_range(sent, everything, everything, max_leaves, draw)
        assert chosen is not None
        record_sent(sent, leaf_range(*chosen))
    assert sent == [0, everything]


@given(st.lists(SETS, max_size=80))
def test_every_leaf_is_counted_up_to_a_bound(those: list[set[int]]) -> None:
    sent = [leaf_range(0, COUNT)]
    for leaves in those:
        record_sent(sent, as_number(leaves))
    for leaf in range(COUNT):
        count = min(sum(leaf in leaves for leaves in those), MAX_SENT_COUNT)
        assert [n for n, leaves in enumerate(sent) if leaves >> leaf & 1] == [count]


def test_leaves_wanted_beyond_the_last_are_not_sent() -> None:
    assert least_sent_range([leaf_range(0, 3)], 1 << 3, -1, 8, random.Random(0)) is None
    assert leaf_range(2, 2) == 0 and leaf_range(5, 2) == 0
