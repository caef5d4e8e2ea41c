"""Which run goes out next: of what was sent least."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.layout import LEAF_BYTES
from shoal_common.runs import least_sent, run
from shoal_fileserver.sent import FORGOTTEN_AFTER_S, MAX_BLOBS, MAX_COUNT, Sent

LEAVES = 20
SIZE = LEAVES * LEAF_BYTES - 5
SETS = st.integers(0, (1 << LEAVES) - 1)


@given(st.lists(st.tuples(SETS, SETS, st.integers(1, 8), st.booleans()), max_size=40), st.integers(0, 1 << 30))
def test_it_chooses_what_least_sent_chooses_of_the_same_counts(
    asked: list[tuple[int, int, int, bool]], seed: int
) -> None:
    sent, counts = Sent(random.Random(seed)), [0] * LEAVES
    for wanted, ready, most, gets_through in asked:
        draw = random.Random()
        draw.setstate(sent._draw.getstate())
        expected = least_sent(counts, wanted, ready, most, draw)
        chosen = sent.choose("blob", SIZE, wanted, ready, most, 0.0)
        assert chosen == expected
        if chosen and gets_through:
            for leaf in range(*chosen):
                counts[leaf] += 1
        elif chosen:
            sent.take_back("blob", *chosen)


@given(st.integers(1, 8), st.integers(1, 5))
def test_every_leaf_goes_out_once_before_any_goes_out_twice(most: int, rounds: int) -> None:
    sent, all_leaves = Sent(random.Random(most)), run(0, LEAVES)
    for _ in range(rounds):
        gone: list[int] = []
        while len(gone) < LEAVES:
            chosen = sent.choose("blob", SIZE, all_leaves, all_leaves, most, 0.0)
            assert chosen is not None
            gone += range(*chosen)
        assert sorted(gone) == list(range(LEAVES))


def test_I7_what_is_kept_is_bounded_and_forgotten() -> None:
    sent, all_leaves = Sent(random.Random(1)), run(0, LEAVES)
    for number in range(3 * MAX_BLOBS):
        sent.choose(str(number), SIZE, all_leaves, all_leaves, 64, float(number))
    assert len(sent._blobs) == MAX_BLOBS
    for _ in range(3 * MAX_COUNT):
        assert sent.choose("often", SIZE, 1, 1, 1, 1e6) == (0, 1)
    assert len(sent._blobs["often"].sets) == MAX_COUNT + 1
    assert list(sent._blobs) == ["often"], "the others were not asked for, for long"
    sent.choose("next", SIZE, 1, 1, 1, 1e6 + FORGOTTEN_AFTER_S + 1)
    assert list(sent._blobs) == ["next"]
