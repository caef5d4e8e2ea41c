"""The scheduler's requests: properties over random states."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_set import MAX_RANGE_LEAVES, leaf_range, leaf_ranges
from shoal_fetcher.swarm import scheduler
from shoal_fetcher.swarm.scheduler import (
    ALL_LEAVES,
    ENDGAME_COPIES,
    MAX_WAKEUP_INTERVAL_S,
    OUTSTANDING_RUNS,
    STALLED_AFTER_S,
    LeafRequest,
    OutstandingRequest,
    PeerState,
    SwarmState,
    hedge_after_s,
    next_requests,
    next_wakeup_s,
    rarest_leaves,
)

COUNT = 40
EVERYTHING = leaf_range(0, COUNT)
SETS = st.integers(0, EVERYTHING)
RATES = st.sampled_from([0.0, 1e5, 25e6, 1e9])


@st.composite
def peers(draw: st.DrawFn) -> list[PeerState]:
    names = draw(st.lists(st.sampled_from("bcdefgh"), unique=True, max_size=6))
    return [
        PeerState(
            node=name,
            leaves=draw(st.one_of(SETS, st.just(EVERYTHING), st.just(ALL_LEAVES))),
            source=draw(st.booleans()),
            fetching=draw(st.booleans()),
            wanted=draw(st.one_of(st.just(ALL_LEAVES), SETS)),
            rate_bytes_per_s=draw(RATES),
            run_s=draw(st.sampled_from([0.0, 0.01, 0.2, 5.0])),
            growth_bytes_per_s=draw(RATES),
            declined_at_s=draw(st.sampled_from([float("-inf"), 99.0, 99.95])),
        )
        for name in names
    ]


@st.composite
def situations(draw: st.DrawFn) -> SwarmState:
    those = draw(peers())
    runs: list[OutstandingRequest] = []
    for peer in those:
        for _ in range(draw(st.integers(0, OUTSTANDING_RUNS))):
            first = draw(st.integers(0, COUNT - 1))
            leaves = leaf_range(first, draw(st.integers(first + 1, COUNT))) & peer.leaves
            of_any = peer.source and draw(st.booleans())
            silent = of_any and draw(st.booleans())
            runs.append(
                OutstandingRequest(
                    node=peer.node,
                    leaves=0 if silent else leaves,
                    any=of_any,
                    possible_leaves=draw(SETS) if silent else 0,
                    asked_at_s=draw(st.sampled_from([80.0, 99.0, 99.9])),
                )
            )
    return SwarmState(
        leaf_count=COUNT,
        have=draw(SETS),
        wanted=draw(st.one_of(st.just(EVERYTHING), SETS)),
        known=draw(st.one_of(st.just(EVERYTHING), SETS)),
        peers=those,
        runs=runs,
        now_s=100.0,
        last_leaf_at_s=draw(st.sampled_from([90.0, 99.9])),
    )


def decided(situation: SwarmState, seed: int) -> list[tuple[LeafRequest, PeerState]]:
    by_name = {p.node: p for p in situation.peers}
    return [(ask, by_name[ask.node]) for ask in next_requests(situation, random.Random(seed))]


def lateness(situation: SwarmState, one: OutstandingRequest) -> bool:
    peer = next((p for p in situation.peers if p.node == one.node), None)
    return situation.now_s - one.asked_at_s >= hedge_after_s(peer)


@given(situations(), st.integers(0))
def test_only_what_is_missing_is_asked_and_only_of_who_has_it(situation: SwarmState, seed: int) -> None:
    missing = situation.wanted & ~situation.have
    for ask, peer in decided(situation, seed):
        assert ask.leaves and not ask.leaves & ~missing
        if ask.any:
            assert peer.source and ask.leaves & peer.leaves
        else:
            assert len(list(leaf_ranges(ask.leaves))) == 1 and not ask.leaves & ~peer.leaves
            assert ask.max_leaves == ask.leaves.bit_count()
            assert peer.source or not ask.leaves & ~situation.known
        assert 1 <= ask.max_leaves <= MAX_RANGE_LEAVES


@given(situations(), st.integers(0))
def test_no_peer_has_more_than_two_requests_and_no_leaf_twice(situation: SwarmState, seed: int) -> None:
    outstanding = Counter(r.node for r in situation.runs)
    asked = {p.node: 0 for p in situation.peers}
    for one in situation.runs:
        asked[one.node] |= one.leaves
    for ask, peer in decided(situation, seed):
        outstanding[ask.node] += 1
        assert outstanding[ask.node] <= OUTSTANDING_RUNS
        assert not ask.leaves & asked[peer.node]
        if not ask.any:
            asked[peer.node] |= ask.leaves


@given(situations(), st.integers(0))
def test_a_leaf_is_requested_twice_only_if_late_or_at_the_end(situation: SwarmState, seed: int) -> None:
    asked = 0
    for one in situation.runs:
        if not lateness(situation, one):
            asked |= one.leaves
    missing = situation.wanted & ~situation.have
    endgame = not missing & ~asked
    copies = Counter(leaf for r in situation.runs for leaf in range(COUNT) if r.leaves >> leaf & 1)
    for ask, _ in decided(situation, seed):
        for leaf in range(COUNT):
            if ask.leaves >> leaf & 1 and not ask.any:
                copies[leaf] += 1
                assert not endgame or copies[leaf] <= ENDGAME_COPIES
        if not endgame:
            assert not ask.leaves & asked
            asked |= 0 if ask.any else ask.leaves


@given(situations(), st.integers(0))
def test_I7_when_stalled_something_available_is_requested(situation: SwarmState, seed: int) -> None:
    if situation.now_s - situation.last_leaf_at_s < STALLED_AFTER_S:
        return
    made = decided(situation, seed)
    on_the_way = {r.node for r in situation.runs} | {ask.node for ask, _ in made}
    missing = situation.wanted & ~situation.have
    for peer in situation.peers:
        can = peer.leaves & missing & (ALL_LEAVES if peer.source else situation.known)
        taken = sum(1 for r in situation.runs if r.node == peer.node) >= OUTSTANDING_RUNS
        assert not can or taken or on_the_way


@given(situations())
def test_the_next_wakeup_is_never_now_and_never_far(situation: SwarmState) -> None:
    assert 0 < next_wakeup_s(situation) <= MAX_WAKEUP_INTERVAL_S


@given(SETS, st.lists(SETS, max_size=9))
def test_the_rarest_are_those_that_the_fewest_have(leaves: int, holdings: list[int]) -> None:
    def count(leaf: int) -> int:
        return sum(h >> leaf & 1 for h in holdings)

    those = [leaf for leaf in range(COUNT) if leaves >> leaf & 1]
    fewest = min(map(count, those), default=0)
    assert rarest_leaves(leaves, holdings) == sum(1 << leaf for leaf in those if count(leaf) == fewest)


def alone(**changes: object) -> SwarmState:
    given: dict[str, object] = {
        "leaf_count": 1000,
        "have": 0,
        "wanted": leaf_range(0, 1000),
        "known": leaf_range(0, 1000),
        "peers": [],
        "runs": [],
        "now_s": 0.0,
        "last_leaf_at_s": 0.0,
    }
    return SwarmState(**{**given, **changes})  # type: ignore[arg-type]  # a situation but for its changes


def test_two_sources_each_send_their_share_by_their_rates() -> None:
    fast = PeerState(
        node="b", leaves=ALL_LEAVES, source=True, rate_bytes_per_s=64 * LEAF_BYTES / scheduler.RUN_TARGET_S
    )
    slow = PeerState(node="c", leaves=ALL_LEAVES, source=True, rate_bytes_per_s=1.0)
    made = next_requests(alone(peers=[slow, fast]), random.Random(0))
    assert sorted((a.node, a.max_leaves) for a in made) == [("b", 64), ("b", 64), ("c", 1), ("c", 1)]
    assert {a.leaves for a in made if a.node == "b"} == {leaf_range(0, 500)}
    assert {a.leaves for a in made if a.node == "c"} == {leaf_range(500, 1000)}


def test_a_source_pauses_while_others_have_to_take_our_leaves() -> None:
    source = PeerState(node="b", leaves=ALL_LEAVES, source=True, rate_bytes_per_s=1e6)
    backlog = alone(
        have=leaf_range(0, scheduler.BACKLOG_RUNS), peers=[source, PeerState(node="c", leaves=0, fetching=True)]
    )
    assert next_requests(backlog, random.Random(0)) == []
    taken = PeerState(node="c", leaves=1, fetching=True)
    assert next_requests(alone(have=leaf_range(0, scheduler.BACKLOG_RUNS), peers=[source, taken]), random.Random(0))
    slow = PeerState(node="c", leaves=0, fetching=True, growth_bytes_per_s=1e5)
    assert next_requests(alone(have=leaf_range(0, scheduler.BACKLOG_RUNS), peers=[source, slow]), random.Random(0))
    gone = PeerState(node="c", leaves=0, fetching=False)
    assert next_requests(alone(have=leaf_range(0, scheduler.BACKLOG_RUNS), peers=[source, gone]), random.Random(0))


def test_in_a_large_swarm_a_source_has_one_request_at_a_time() -> None:
    source = PeerState(node="z", leaves=ALL_LEAVES, source=True)
    others = [PeerState(node=name, leaves=0, fetching=True) for name in "bcdefg"]
    for count in range(len(others)):
        made = next_requests(alone(peers=[source, *others[:count]]), random.Random(0))
        assert len(made) == (1 if count >= scheduler.BUSY_SOURCE_NODES else OUTSTANDING_RUNS)


def test_a_source_with_time_left_is_asked_for_what_peers_have() -> None:
    other = PeerState(node="c", leaves=leaf_range(0, 1000), fetching=True, rate_bytes_per_s=1e6)
    busy = PeerState(node="b", leaves=ALL_LEAVES, source=True, rate_bytes_per_s=2e6)
    assert {a.node for a in next_requests(alone(peers=[busy, other]), random.Random(0))} == {"c"}
    idle = PeerState(node="b", leaves=ALL_LEAVES, source=True, rate_bytes_per_s=4e6)
    assert "b" in {a.node for a in next_requests(alone(peers=[idle, other]), random.Random(0))}


def test_a_source_that_declined_is_left_alone_for_a_moment() -> None:
    declined = PeerState(node="b", leaves=ALL_LEAVES, source=True, declined_at_s=0.0)
    before = alone(peers=[declined], now_s=0.1)
    assert next_requests(before, random.Random(0)) == [] and next_wakeup_s(before) <= scheduler.DECLINED_BACKOFF_S
    assert next_requests(alone(peers=[declined], now_s=scheduler.DECLINED_BACKOFF_S), random.Random(0))


def test_the_last_leaves_are_requested_of_peers_and_not_a_source() -> None:
    source = PeerState(node="b", leaves=ALL_LEAVES, source=True)
    others = [PeerState(node=name, leaves=1, fetching=True) for name in "cdefg"]
    asked = [OutstandingRequest(node="c", leaves=1, asked_at_s=0.0)]
    made = next_requests(alone(wanted=1, peers=[source, *others], runs=asked, now_s=0.1), random.Random(0))
    assert len(made) == ENDGAME_COPIES - 1 and {a.leaves for a in made} == {1}
    assert not {a.node for a in made} & {"b", "c"}


def test_I7_after_two_stalled_seconds_a_source_is_asked_anyway() -> None:
    source = PeerState(node="b", leaves=ALL_LEAVES, source=True)
    stuck = PeerState(node="c", leaves=leaf_range(0, 900), fetching=True)
    silent = [OutstandingRequest(node="c", leaves=leaf_range(n, n + 1), asked_at_s=0.0) for n in (0, 1)]
    have = leaf_range(900, 1000)
    assert next_requests(alone(have=have, peers=[source, stuck], runs=silent, now_s=1.9), random.Random(0)) == []
    still = next_requests(alone(have=have, peers=[source, stuck], runs=silent, now_s=2.0), random.Random(0))
    assert {(a.node, a.any) for a in still} == {("b", True)}


def test_a_late_range_is_requested_from_another_peer() -> None:
    late = PeerState(node="b", leaves=EVERYTHING, run_s=1.0)
    other = PeerState(node="c", leaves=EVERYTHING)
    own = [
        OutstandingRequest(node="b", leaves=leaf_range(0, 4), asked_at_s=0.0),
        OutstandingRequest(node="c", leaves=leaf_range(4, COUNT), asked_at_s=2.9),
    ]
    before = alone(wanted=EVERYTHING, peers=[late, other], runs=own, now_s=2.99, last_leaf_at_s=2.9)
    assert 0 < next_wakeup_s(before) < 0.011 and next_requests(before, random.Random(0)) == []
    after = alone(wanted=EVERYTHING, peers=[late, other], runs=own, now_s=3.0, last_leaf_at_s=2.9)
    made = next_requests(after, random.Random(0))
    assert made and all(a.node == "c" and not a.leaves & ~leaf_range(0, 4) for a in made)
