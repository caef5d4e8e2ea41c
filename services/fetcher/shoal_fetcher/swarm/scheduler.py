"""Decides what to ask of which node next, while a blob arrives from several at once. Pure; rules: docs/transfer.md.

The caller passes what it knows as a `SwarmState`, sends the requests that `next_requests` returns, and calls again
when something has changed (a request was answered, failed or was cancelled; a peer published what it has) or when
`next_wakeup_s` has passed. It ends a request whose connection brings nothing for too long: nothing here does.

Sets of leaves are ints, bit i is leaf i (`leaf_set.py`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_set import MAX_RANGE_LEAVES, aligned_range, leaf_range, random_leaf

OUTSTANDING_RUNS = 2
"""Requests to one peer at a time."""
BUSY_SOURCE_NODES = 4
"""With this many other fetching nodes, one request at a time keeps a source busy, and its leaves arrive sooner."""
BACKLOG_RUNS = 6
"""A node with this many runs that no other fetching node has asks sources for no more of them."""
RUN_TARGET_S = 0.03
"""A run is as long as what a peer has sent in this time so far."""
STALLED_AFTER_S = 2.0
"""After this long without a new leaf, sources are asked for anything (I7)."""
LATE_FACTOR = 3.0
"""A run that takes this many times its peer's average is also asked of another peer."""
LATE_WITHOUT_AVERAGE_S = 2.0
"""The same for a peer that has no average yet."""
MIN_LATE_S = 0.25
"""No run is late before this: on fast links three times the average is nothing."""
ENDGAME_RUNS = 2
"""When at most this many runs are missing, and all are requested, they are asked of others as well."""
ENDGAME_LEAVES = 4
"""And at most this many leaves: the rest of a long run is hedged when it is late, not sent twice."""
ENDGAME_COPIES = 3
"""How often a leaf is requested in the endgame, the first request included."""
DECLINED_BACKOFF_S = 0.2
"""A source that had nothing for us is not asked for `any` again for this long."""
MAX_WAKEUP_INTERVAL_S = 1.0
"""The longest time between two decisions: peers fall silent without notice."""
SLOW_PEER_SHARE = 0.25
"""A node whose leaves grow at less than this share of a source's rate to us is not waited for."""
IDLE_FACTOR = 4.0
"""A source this many times faster than the fastest other node is asked for whatever is missing."""
ALL_LEAVES = -1
"""The set of all leaves of any blob."""


class PeerState(msgspec.Struct, frozen=True, kw_only=True):
    """A node that can be asked now: reachable, not banned, and not ourselves."""

    node: str
    leaves: int
    """Leaves that it can be asked for now. ALL_LEAVES is valid for a node with the complete blob."""
    source: bool = False
    """It has the complete blob, or is its origin: may be asked for `any`."""
    fetching: bool = False
    """It published within 3 s that it fetches this blob: what it has is replicated, what it lacks is wanted."""
    wanted: int = ALL_LEAVES
    """Leaves that it fetches, where that is known not to be all."""
    rate_bytes_per_s: float = 0.0
    """Moving average over its runs of bytes over time. 0: unknown."""
    run_s: float = 0.0
    """Moving average of the seconds from a request to its end. 0: unknown."""
    growth_bytes_per_s: float = 0.0
    """Moving average of how fast its published leaves grow (bytes/s). 0: unknown."""
    declined_at_s: float = float("-inf")
    """When it last answered `any` with 204: nothing for us."""


class OutstandingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is not finished."""

    node: str
    leaves: int
    """Its leaves that have not arrived; 0 while an `any` has not been told yet which they are."""
    any: bool = False
    possible_leaves: int = 0
    """Of an `any` the bitmap that was sent: until the source has chosen, it may send any of these."""
    asked_at_s: float


class SwarmState(msgspec.Struct, frozen=True, kw_only=True):
    """The input of a decision. Times are of one monotonic clock, in seconds."""

    leaf_count: int
    have: int
    """Leaves that are verified and written here."""
    wanted: int
    """Leaves to fetch: all, or some."""
    known: int
    """Leaves whose hash is known, even if provisional. Others are asked of sources alone."""
    peers: list[PeerState]
    runs: list[OutstandingRequest]
    now_s: float
    last_leaf_at_s: float
    """When the last leaf arrived from anywhere; before the first one, when the fetch began."""


class LeafRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to send now."""

    node: str
    any: bool
    leaves: int
    """Of an `any` the bitmap of what is wanted; else a run, all of which the node has published."""
    max_leaves: int
    """The length of the run, or the maximum for an `any`."""


def next_requests(state: SwarmState, draw: random.Random) -> list[LeafRequest]:
    """Return all requests to send now, besides the outstanding ones; at most OUTSTANDING_RUNS to one peer."""
    return _Scheduler(state, draw).requests()


def next_wakeup_s(state: SwarmState) -> float:
    """Return the seconds, at most MAX_WAKEUP_INTERVAL_S, after which time alone may change the result of
    `next_requests`.

    That is the next moment at which a run becomes late, a source may be asked again, or progress has stalled.
    """
    peers = {p.node: p for p in state.peers}
    moments = [r.asked_at_s + hedge_after_s(peers.get(r.node)) for r in state.runs]
    moments += [p.declined_at_s + DECLINED_BACKOFF_S for p in state.peers]
    moments.append(state.last_leaf_at_s + STALLED_AFTER_S)
    return min([m - state.now_s for m in moments if m > state.now_s] + [MAX_WAKEUP_INTERVAL_S])


def hedge_after_s(peer: PeerState | None) -> float:
    """Return the seconds after which a run of this peer is late."""
    if peer is None or not peer.run_s:
        return LATE_WITHOUT_AVERAGE_S
    return max(LATE_FACTOR * peer.run_s, MIN_LATE_S)


def run_length(peer: PeerState, missing_count: int, peer_count: int) -> int:
    """Return how many leaves to ask of this peer at once, by its rate, so that all peers share the last ones."""
    by_rate = int(peer.rate_bytes_per_s * RUN_TARGET_S / LEAF_BYTES)
    node_context = -(-missing_count // (OUTSTANDING_RUNS * max(peer_count, 1)))
    return max(min(by_rate, node_context, MAX_RANGE_LEAVES), 1)


def rarest_leaves(leaves: int, holdings: Iterable[int]) -> int:
    """Return those of some leaves that the fewest of `holdings` have."""
    # Counts of all leaves at once, in binary: bit i of digit k is the k-th digit of leaf i's count.
    digits: list[int] = []
    for holder in holdings:
        carry = holder & leaves
        for place, digit in enumerate(digits):
            digits[place], carry = digit ^ carry, digit & carry
        if carry:
            digits.append(carry)
    for digit in reversed(digits):
        leaves = leaves & ~digit or leaves
    return leaves


class _Scheduler:
    """One decision: what it has requested so far counts as outstanding."""

    def __init__(self, state: SwarmState, draw: random.Random) -> None:
        s = self._s = state
        self._draw = draw
        self._missing = s.wanted & ~s.have
        self._stalled = s.now_s - s.last_leaf_at_s >= STALLED_AFTER_S
        self._useful = [p for p in s.peers if p.leaves & self._missing]
        self._others = [p for p in s.peers if p.fetching and not p.source]
        self._replicated = _union(p.leaves for p in self._others)
        self._sources = sorted(p.node for p in s.peers if p.source)
        self._outstanding = Counter(r.node for r in s.runs)
        self._requested_from: dict[str, int] = {}
        self._may_of: dict[str, int] = {}
        self._need = self._missing
        peers = {p.node: p for p in s.peers}
        for r in s.runs:
            self._requested_from[r.node] = self._requested_from.get(r.node, 0) | r.leaves
            if s.now_s - r.asked_at_s >= hedge_after_s(peers.get(r.node)):
                continue  # a late run is needed again, from another peer
            self._need &= ~r.leaves
            if r.any and not r.leaves:
                self._may_of[r.node] = self._may_of.get(r.node, 0) | r.possible_leaves
        self._requests: list[LeafRequest] = []

    def requests(self) -> list[LeafRequest]:
        """Fill the first slot of every peer, then the second."""
        order = list(self._useful)
        self._draw.shuffle(order)
        for _ in range(OUTSTANDING_RUNS):
            for peer in order:
                if not self._has_slot(peer):
                    continue
                if peer.source:
                    self._ask_source(peer)
                else:
                    self._ask_run(peer, self._need & self._s.known & ~self._possibly_arriving(peer))
        self._endgame(order)
        return self._requests

    def _has_slot(self, peer: PeerState) -> bool:
        is_source_busy = peer.source and len(self._others) >= BUSY_SOURCE_NODES
        return self._outstanding[peer.node] < (1 if is_source_busy else OUTSTANDING_RUNS)

    def _ask_source(self, peer: PeerState) -> None:
        leaves = self._need & ~self._requested_from.get(peer.node, 0) & ~self._possibly_arriving(peer)
        if not (self._stalled or self._idle(peer)):
            # What another fetching node has is taken from there: a source's time is for what nobody has.
            leaves &= ~self._replicated
            if self._throttled(peer):
                return
        if not leaves & peer.leaves:
            return
        if self._s.now_s - peer.declined_at_s < DECLINED_BACKOFF_S:
            if self._stalled:
                # It holds back what is on its way to others, and they are stuck or gone.
                self._ask_run(peer, leaves)
            return
        in_zone = leaves & self._zone(peer)
        self._add_request(
            peer, leaves=in_zone if in_zone & peer.leaves else leaves, max_leaves=self._length(peer), any_of=True
        )

    def _ask_run(self, peer: PeerState, leaves: int) -> None:
        leaves &= peer.leaves & ~self._requested_from.get(peer.node, 0)
        if leaves:
            rare = rarest_leaves(leaves, (p.leaves for p in self._others))
            first, end = aligned_range(random_leaf(rare, self._draw), leaves, self._length(peer))
            self._add_request(peer, leaves=leaf_range(first, end), max_leaves=end - first)

    def _add_request(self, peer: PeerState, leaves: int, max_leaves: int, any_of: bool = False) -> None:
        self._requests.append(LeafRequest(node=peer.node, any=any_of, leaves=leaves, max_leaves=max_leaves))
        self._outstanding[peer.node] += 1
        if any_of:
            self._may_of[peer.node] = self._may_of.get(peer.node, 0) | leaves
        else:
            self._requested_from[peer.node] = self._requested_from.get(peer.node, 0) | leaves
            self._need &= ~leaves

    def _possibly_arriving(self, peer: PeerState) -> int:
        """Return leaves that may be on their way from sources that have not chosen yet; none when progress has
        stalled.
        """
        return 0 if self._stalled else _union(may for node, may in self._may_of.items() if node != peer.node)

    def _zone(self, source: PeerState) -> int:
        """Return the part of the blob that this source is asked for first, so that several send different leaves."""
        place, count = self._sources.index(source.node), len(self._sources)
        return leaf_range(place * self._s.leaf_count // count, (place + 1) * self._s.leaf_count // count)

    def _idle(self, source: PeerState) -> bool:
        """Return whether a source is so much faster than any other node that it must have time left over."""
        fastest = max((p.rate_bytes_per_s for p in self._others), default=0.0)
        return 0 < fastest * IDLE_FACTOR <= source.rate_bytes_per_s

    def _throttled(self, source: PeerState) -> bool:
        """Return whether we have enough leaves that the others have yet to take from us.

        A node that takes far less than this source gives us is not waited for: it has no use for what we would leave
        it.
        """
        receivers = [
            p for p in self._others if not 0 < p.growth_bytes_per_s < source.rate_bytes_per_s * SLOW_PEER_SHARE
        ]
        backlog = self._s.have & ~self._replicated & _union(p.wanted for p in receivers)
        return backlog.bit_count() >= BACKLOG_RUNS * self._length(source)

    def _length(self, peer: PeerState) -> int:
        return run_length(peer, self._missing.bit_count(), len(self._useful))

    def _endgame(self, order: Sequence[PeerState]) -> None:
        """Ask more nodes for the last runs; sources only for what nobody else has: their time is the dearest."""
        last = {r.leaves & self._missing for r in self._s.runs} - {0}
        undecided = any(r.any and not r.leaves for r in self._s.runs)
        if self._need or self._requests or undecided or len(last) > ENDGAME_RUNS:
            return
        if self._missing.bit_count() > ENDGAME_LEAVES:
            return
        elsewhere = _union(p.leaves for p in order if not p.source)
        copies = [r.leaves for r in self._s.runs]
        for peer in order:
            leaves = self._missing & self._s.known & ~_covered(copies, ENDGAME_COPIES)
            if self._has_slot(peer):
                count = len(self._requests)
                self._ask_run(peer, leaves & ~elsewhere if peer.source else leaves)
                copies += [a.leaves for a in self._requests[count:]]


def _union(sets: Iterable[int]) -> int:
    union = 0
    for leaves in sets:
        union |= leaves
    return union


def _covered(sets: Iterable[int], times: int) -> int:
    """Return the leaves that at least so many of the sets have."""
    levels = [0] * times
    for leaves in sets:
        for level in range(times - 1, 0, -1):
            levels[level] |= levels[level - 1] & leaves
        levels[0] |= leaves
    return levels[-1]


def running_average(average: float, newest: float) -> float:
    """Return a moving average with its newest value, which weighs 0.3; `average` is 0 before the first one."""
    return average + 0.3 * (newest - average) if average else newest
