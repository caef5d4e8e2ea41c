"""Which run goes out next: of what was sent least, and is not on its way to somebody."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.layout import LEAF_BYTES
from shoal_common.runs import MAX_SENT_COUNT, run
from shoal_fileserver.sent import FORGOTTEN_AFTER_S, MAX_BLOBS, ON_ITS_WAY_S, Going, Sent

LEAVES = 20
SIZE = LEAVES * LEAF_BYTES - 5
ALL = run(0, LEAVES)
SETS = st.integers(0, ALL)


def of(leaves: int) -> list[int]:
    """A set's leaves."""
    return [leaf for leaf in range(LEAVES) if leaves >> leaf & 1]


@given(st.lists(st.tuples(SETS, SETS, st.integers(1, 8), st.integers(-1, LEAVES)), max_size=40), st.integers())
def test_what_is_chosen_is_wanted_ready_sent_least_and_not_on_its_way(
    asked: list[tuple[int, int, int, int]], seed: int
) -> None:
    sent, counts = Sent(random.Random(seed)), [0] * LEAVES
    under_way: list[Going] = []
    for wanted, ready, most, through in asked:
        busy = {leaf for going in under_way for leaf in range(going.first, going.end)}
        able = [leaf for leaf in of(wanted & ready) if leaf not in busy]
        chosen = sent.choose("blob", SIZE, wanted, ready, most, 0.0)
        assert (chosen is None) == (not able)
        if chosen is None:
            if under_way:
                sent.ended(under_way.pop(0), LEAVES)
            continue
        run_of = range(chosen.first, chosen.end)
        fewest = min(counts[leaf] for leaf in able)
        assert 0 < len(run_of) <= most and set(run_of) <= set(able)
        assert {counts[leaf] for leaf in run_of} == {fewest}
        if through < 0:
            under_way.append(chosen)
        else:
            sent.ended(chosen, through)
        for leaf in run_of:
            counts[leaf] += through < 0 or leaf < through


@given(st.integers(1, 8), st.integers(1, 5))
def test_every_leaf_goes_out_once_before_any_goes_out_twice(most: int, rounds: int) -> None:
    sent = Sent(random.Random(most))
    for _ in range(rounds):
        gone: list[int] = []
        while len(gone) < LEAVES:
            chosen = sent.choose("blob", SIZE, ALL, ALL, most, 0.0)
            assert chosen is not None
            sent.ended(chosen, LEAVES)
            gone += range(chosen.first, chosen.end)
        assert sorted(gone) == list(range(LEAVES))


def test_what_is_asked_for_by_its_place_counts_too_and_a_run_that_takes_long_holds_nothing_back() -> None:
    sent = Sent(random.Random(1))
    assert sent.asked("blob", 0, 5, 0.0) is None, "nobody has wanted any of it"
    assert sent.choose("blob", SIZE, 1, 1, 1, 0.0) is not None
    by_place = sent.asked("blob", 1, LEAVES - 1, 0.0)
    assert by_place is not None
    last = sent.choose("blob", SIZE, ALL, ALL, 8, 0.0)
    assert last is not None and (last.first, last.end) == (LEAVES - 1, LEAVES)
    assert sent.choose("blob", SIZE, ALL, ALL, 8, ON_ITS_WAY_S - 1) is None
    assert sent.choose("blob", SIZE, ALL, ALL, 8, ON_ITS_WAY_S) is not None


def test_I7_what_is_kept_is_bounded_and_forgotten() -> None:
    sent = Sent(random.Random(1))
    for number in range(3 * MAX_BLOBS):
        old = sent.choose(str(number), SIZE, ALL, ALL, 64, float(number))
    assert len(sent._blobs) == MAX_BLOBS
    for _ in range(3 * MAX_SENT_COUNT):
        chosen = sent.choose("often", SIZE, 1, 1, 1, 1e6)
        assert chosen is not None
        sent.ended(chosen, 1)
    assert len(sent._blobs["often"].sets) == MAX_SENT_COUNT + 1 and not sent._blobs["often"].going
    assert list(sent._blobs) == ["often"], "the others were not asked for, for long"
    assert old is not None
    sent.ended(old, 0)  # of a blob that is forgotten
    sent.choose("next", SIZE, 1, 1, 1, 1e6 + FORGOTTEN_AFTER_S + 1)
    assert list(sent._blobs) == ["next"]
