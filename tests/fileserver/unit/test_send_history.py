"""Which leaves are sent next: those sent least, and not in flight."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_set import MAX_SENT_COUNT, leaf_range
from shoal_fileserver.send_history import (
    EXPIRY_S,
    IN_FLIGHT_TIMEOUT_S,
    MAX_BLOBS,
    RECENTLY_SENT_S,
    InFlightLeaves,
    SendHistory,
)

LEAVES = 20
SIZE = LEAVES * LEAF_BYTES - 5
ALL = leaf_range(0, LEAVES)
SETS = st.integers(0, ALL)


def of(leaves: int) -> list[int]:
    """Return a set's leaves."""
    return [leaf for leaf in range(LEAVES) if leaves >> leaf & 1]


@given(st.lists(st.tuples(SETS, SETS, st.integers(1, 8), st.integers(-1, LEAVES)), max_size=40), st.integers())
def test_chosen_leaves_are_wanted_ready_and_sent_least(asked: list[tuple[int, int, int, int]], seed: int) -> None:
    sent, counts = SendHistory(random.Random(seed)), [0] * LEAVES
    under_way: list[InFlightLeaves] = []
    just_gone: dict[int, float] = {}
    for step, (wanted, ready, most, through) in enumerate(asked):
        now_s = step * RECENTLY_SENT_S / 4
        busy = {leaf for going in under_way for leaf in range(going.first, going.end)}
        busy |= {leaf for leaf, since_s in just_gone.items() if now_s < since_s + RECENTLY_SENT_S}
        able = [leaf for leaf in of(wanted & ready) if leaf not in busy]
        chosen = sent.pick_next("blob", SIZE, wanted, ready, most, now_s)
        assert (chosen is None) == (not able)
        if chosen is None:
            if under_way:
                going = under_way.pop(0)
                just_gone |= dict.fromkeys(range(going.first, going.end), now_s)
                sent.record_finished(going, LEAVES, now_s)
            continue
        run_of = range(chosen.first, chosen.end)
        fewest = min(counts[leaf] for leaf in able)
        assert 0 < len(run_of) <= most and set(run_of) <= set(able)
        assert {counts[leaf] for leaf in run_of} == {fewest}
        if through < 0:
            under_way.append(chosen)
        else:
            just_gone |= {leaf: now_s for leaf in run_of if leaf < through}
            sent.record_finished(chosen, through, now_s)
        for leaf in run_of:
            counts[leaf] += through < 0 or leaf < through


@given(st.integers(1, 8), st.integers(1, 5))
def test_every_leaf_goes_out_once_before_any_goes_out_twice(most: int, rounds: int) -> None:
    sent = SendHistory(random.Random(most))
    for number in range(rounds):
        gone: list[int] = []
        while chosen := sent.pick_next("blob", SIZE, ALL, ALL, most, number * RECENTLY_SENT_S):
            sent.record_finished(chosen, LEAVES, number * RECENTLY_SENT_S)
            gone += range(chosen.first, chosen.end)
        assert sorted(gone) == list(range(LEAVES)), "what has just gone waits until others may have heard of it"


def test_ranges_asked_by_index_count_and_slow_ones_do_not_block() -> None:
    sent = SendHistory(random.Random(1))
    assert sent.record_requested("blob", 0, 5, 0.0) is None, "nobody has wanted any of it"
    assert sent.pick_next("blob", SIZE, 1, 1, 1, 0.0) is not None
    by_place = sent.record_requested("blob", 1, LEAVES - 1, 0.0)
    assert by_place is not None
    last = sent.pick_next("blob", SIZE, ALL, ALL, 8, 0.0)
    assert last is not None and (last.first, last.end) == (LEAVES - 1, LEAVES)
    assert sent.pick_next("blob", SIZE, ALL, ALL, 8, IN_FLIGHT_TIMEOUT_S - 1) is None
    assert sent.pick_next("blob", SIZE, ALL, ALL, 8, IN_FLIGHT_TIMEOUT_S) is not None


def test_I7_what_is_kept_is_bounded_and_forgotten() -> None:
    sent = SendHistory(random.Random(1))
    for number in range(3 * MAX_BLOBS):
        old = sent.pick_next(str(number), SIZE, ALL, ALL, 64, float(number))
    assert len(sent._blobs) == MAX_BLOBS
    for number in range(3 * MAX_SENT_COUNT):
        chosen = sent.pick_next("often", SIZE, 1, 1, 1, 1e6 + number * RECENTLY_SENT_S)
        assert chosen is not None
        sent.record_finished(chosen, 1, 1e6 + number * RECENTLY_SENT_S)
    assert len(sent._blobs["often"].sets) == MAX_SENT_COUNT + 1 and sent._blobs["often"].in_flight == [chosen]
    assert list(sent._blobs) == ["often"], "the others were not asked for, for long"
    assert old is not None
    sent.record_finished(old, 0, 1e6)  # of a blob that was dropped
    sent.pick_next("next", SIZE, 1, 1, 1, 2e6 + EXPIRY_S)
    assert list(sent._blobs) == ["next"]
