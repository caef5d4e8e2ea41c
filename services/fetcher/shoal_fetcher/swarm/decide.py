"""What to ask of whom next, while a blob arrives from several nodes at once. Pure: docs/transfer.md has the rules.

The shell tells what it knows as a `Situation`, asks what `asks` says, and looks again when something has changed (a
run was answered, failed or was given up; a peer said what it has) or when `wake_s` has passed. It ends a run whose
connection brings nothing for too long: nothing here gives a run up.

Sets of leaves are ints, bit i is leaf i (shoal_common/runs.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from shoal_common.layout import LEAF_BYTES
from shoal_common.runs import MAX_RUN_LEAVES, drawn, run, run_around

OUTSTANDING_RUNS = 2
"""So many runs are asked of one peer at a time."""
CROWD_NODES = 4
"""Where so many others fetch as well, one run at a time keeps a source busy, and what it sends arrives sooner."""
BACKLOG_RUNS = 6
"""With so many runs that no other fetching node has, a node does not ask sources for more of them."""
RUN_S = 0.03
"""A run is as long as what comes in this time, at the rate its peer has given us so far."""
STILL_S = 2.0
"""When nothing has moved for so long, sources are asked for anything (I7)."""
LATE_FACTOR = 3.0
"""A run that takes so many times its peer's average is asked of another peer as well."""
LATE_UNKNOWN_S = 2.0
"""The same for a peer that has no average yet."""
MIN_LATE_S = 0.25
"""No run is late before: on fast links three times the average is nothing."""
ENDGAME_RUNS = 2
"""When no more runs are missing, and all have been asked for, they are asked of others as well."""
ENDGAME_LEAVES = 4
"""And no more leaves: the rest of a long run is hedged when it is late, not sent twice."""
ENDGAME_COPIES = 3
"""So many times, the first one included, a leaf is asked for in the endgame."""
DECLINED_S = 0.2
"""A source that had nothing for us is not asked for `any` again before."""
LOOK_AGAIN_S = 1.0
"""The shell looks again after this at the latest: peers fall silent without saying so."""
WAITED_FOR = 0.25
"""A node whose part of the blob grows at less than this share of what a source gives us is not waited for."""
IDLE_FACTOR = 4.0
"""A source that gives us so many times what the fastest other node does is asked for whatever is missing."""
EVERY_LEAF = -1
"""The set of all leaves of any blob."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A node that can be asked now: it can be reached, is not banned, and is not ourselves."""

    node: str
    leaves: int
    """What it can be asked for now; all leaves of a whole holder. EVERY_LEAF will do for it."""
    source: bool = False
    """It has the blob whole, or is its origin: may be asked for `any`."""
    fetching: bool = False
    """It was heard within 3 s as one that fetches this blob: what it has is replicated, what it lacks is wanted."""
    wanted: int = EVERY_LEAF
    """What it fetches, where that is known not to be all."""
    rate_bytes_per_s: float = 0.0
    """Moving average over runs of what it gave us: bytes of a run over its time. 0: unknown."""
    run_s: float = 0.0
    """Moving average of the time from asking it for a run to its end, in seconds. 0: unknown."""
    grows_bytes_per_s: float = 0.0
    """Moving average of how fast what it has grows, by what it says (bytes/s). 0: unknown."""
    declined_at_s: float = float("-inf")
    """When it last answered `any` with 204: nothing for us."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked and is not answered to its end."""

    node: str
    leaves: int
    """Those of it that have not arrived; 0 while an `any` has not said yet which they are."""
    any: bool = False
    may: int = 0
    """Of an `any` the bitmap that was sent (`Ask.leaves`): until it says, it may turn out to be any of these."""
    asked_at_s: float


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known when it is decided. Times are of one monotonic clock, in seconds."""

    leaf_count: int
    have: int
    """Leaves that are verified and written here."""
    wanted: int
    """Leaves that are to be here: all, or some."""
    known: int
    """Leaves whose hash is known, be it provisional. Others are asked of sources alone."""
    peers: list[Peer]
    runs: list[Run]
    now_s: float
    moved_at_s: float
    """When a leaf last arrived from anywhere; before the first one, when the fetch began."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request to send now."""

    node: str
    any: bool
    leaves: int
    """Of an `any` the bitmap of what is wanted; else a run, all of which this node says it has."""
    max_leaves: int
    """The length of the run, or the longest that an `any` may be."""


def asks(situation: Situation, draw: random.Random) -> list[Ask]:
    """All that is to be asked now, besides what is outstanding. Never more than OUTSTANDING_RUNS of one peer."""
    return _Choosing(situation, draw).asks()


def wake_s(situation: Situation) -> float:
    """Seconds from now, at most LOOK_AGAIN_S, after which time alone may have changed the answer of `asks`.

    That is the next moment at which a run becomes late, a source may be asked again, or all is still for too long.
    """
    peers = {p.node: p for p in situation.peers}
    moments = [r.asked_at_s + late_s(peers.get(r.node)) for r in situation.runs]
    moments += [p.declined_at_s + DECLINED_S for p in situation.peers]
    moments.append(situation.moved_at_s + STILL_S)
    return min([m - situation.now_s for m in moments if m > situation.now_s] + [LOOK_AGAIN_S])


def late_s(peer: Peer | None) -> float:
    """Seconds after which a run of this peer is late."""
    if peer is None or not peer.run_s:
        return LATE_UNKNOWN_S
    return max(LATE_FACTOR * peer.run_s, MIN_LATE_S)


def run_leaves(peer: Peer, missing_count: int, peer_count: int) -> int:
    """How many leaves to ask this peer for at once, by its rate, and so that the last ones are shared among all."""
    by_rate = int(peer.rate_bytes_per_s * RUN_S / LEAF_BYTES)
    shared = -(-missing_count // (OUTSTANDING_RUNS * max(peer_count, 1)))
    return max(min(by_rate, shared, MAX_RUN_LEAVES), 1)


def rarest(leaves: int, holdings: Iterable[int]) -> int:
    """Those of some leaves that the fewest of `holdings` have."""
    # Counts of all leaves at once, in binary: bit i of digit k is the k-th digit of leaf i's count.
    digits: list[int] = []
    for holding in holdings:
        carry = holding & leaves
        for place, digit in enumerate(digits):
            digits[place], carry = digit ^ carry, digit & carry
        if carry:
            digits.append(carry)
    for digit in reversed(digits):
        leaves = leaves & ~digit or leaves
    return leaves


class _Choosing:
    """One decision under way: what it has asked for so far counts as outstanding."""

    def __init__(self, situation: Situation, draw: random.Random) -> None:
        s = self._s = situation
        self._draw = draw
        self._missing = s.wanted & ~s.have
        self._still = s.now_s - s.moved_at_s >= STILL_S
        self._useful = [p for p in s.peers if p.leaves & self._missing]
        self._others = [p for p in s.peers if p.fetching and not p.source]
        self._held = _union(p.leaves for p in self._others)
        self._sources = sorted(p.node for p in s.peers if p.source)
        self._outstanding = Counter(r.node for r in s.runs)
        self._asked_of: dict[str, int] = {}
        self._may_of: dict[str, int] = {}
        self._need = self._missing
        peers = {p.node: p for p in s.peers}
        for r in s.runs:
            self._asked_of[r.node] = self._asked_of.get(r.node, 0) | r.leaves
            if s.now_s - r.asked_at_s >= late_s(peers.get(r.node)):
                continue  # what is late is needed again, of another peer
            self._need &= ~r.leaves
            if r.any and not r.leaves:
                self._may_of[r.node] = self._may_of.get(r.node, 0) | r.may
        self._asks: list[Ask] = []

    def asks(self) -> list[Ask]:
        """Fill everybody's first place, then everybody's second one."""
        order = list(self._useful)
        self._draw.shuffle(order)
        for _ in range(OUTSTANDING_RUNS):
            for peer in order:
                if not self._free(peer):
                    continue
                if peer.source:
                    self._ask_source(peer)
                else:
                    self._ask_run(peer, self._need & self._s.known & ~self._open(peer))
        self._endgame(order)
        return self._asks

    def _free(self, peer: Peer) -> bool:
        crowd = peer.source and len(self._others) >= CROWD_NODES
        return self._outstanding[peer.node] < (1 if crowd else OUTSTANDING_RUNS)

    def _ask_source(self, peer: Peer) -> None:
        leaves = self._need & ~self._asked_of.get(peer.node, 0) & ~self._open(peer)
        if not (self._still or self._idle(peer)):
            # What another fetching node has comes from there: a source's time is for what nobody has.
            leaves &= ~self._held
            if self._throttled(peer):
                return
        if not leaves & peer.leaves:
            return
        if self._s.now_s - peer.declined_at_s < DECLINED_S:
            if self._still:
                # It keeps back what is on its way to others; they do not get on with it, or are gone.
                self._ask_run(peer, leaves)
            return
        mine = leaves & self._zone(peer)
        self._ask(peer, leaves=mine if mine & peer.leaves else leaves, max_leaves=self._length(peer), any_of=True)

    def _ask_run(self, peer: Peer, leaves: int) -> None:
        leaves &= peer.leaves & ~self._asked_of.get(peer.node, 0)
        if leaves:
            rare = rarest(leaves, (p.leaves for p in self._others))
            first, end = run_around(drawn(rare, self._draw), leaves, self._length(peer))
            self._ask(peer, leaves=run(first, end), max_leaves=end - first)

    def _ask(self, peer: Peer, leaves: int, max_leaves: int, any_of: bool = False) -> None:
        self._asks.append(Ask(node=peer.node, any=any_of, leaves=leaves, max_leaves=max_leaves))
        self._outstanding[peer.node] += 1
        if any_of:
            self._may_of[peer.node] = self._may_of.get(peer.node, 0) | leaves
        else:
            self._asked_of[peer.node] = self._asked_of.get(peer.node, 0) | leaves
            self._need &= ~leaves

    def _open(self, peer: Peer) -> int:
        """What may be on its way from others that have not said yet what they send. When all is still: nothing."""
        return 0 if self._still else _union(may for node, may in self._may_of.items() if node != peer.node)

    def _zone(self, source: Peer) -> int:
        """The part of the blob that this source is asked for first, so that several do not send the same leaves."""
        place, count = self._sources.index(source.node), len(self._sources)
        return run(place * self._s.leaf_count // count, (place + 1) * self._s.leaf_count // count)

    def _idle(self, source: Peer) -> bool:
        """Whether a source gives us so much more than any other node that its time must be left over."""
        fastest = max((p.rate_bytes_per_s for p in self._others), default=0.0)
        return 0 < fastest * IDLE_FACTOR <= source.rate_bytes_per_s

    def _throttled(self, source: Peer) -> bool:
        """Whether we have enough that the others have yet to take from us.

        Who takes far less than this source gives us is not waited for: it has no use for what we would leave it.
        """
        takers = [p for p in self._others if not 0 < p.grows_bytes_per_s < source.rate_bytes_per_s * WAITED_FOR]
        backlog = self._s.have & ~self._held & _union(p.wanted for p in takers)
        return backlog.bit_count() >= BACKLOG_RUNS * self._length(source)

    def _length(self, peer: Peer) -> int:
        return run_leaves(peer, self._missing.bit_count(), len(self._useful))

    def _endgame(self, order: Sequence[Peer]) -> None:
        """Ask more nodes for the last runs. Sources only for what nobody else has: their time is the dearest."""
        last = {r.leaves & self._missing for r in self._s.runs} - {0}
        unsaid = any(r.any and not r.leaves for r in self._s.runs)
        if self._need or self._asks or unsaid or len(last) > ENDGAME_RUNS:
            return
        if self._missing.bit_count() > ENDGAME_LEAVES:
            return
        elsewhere = _union(p.leaves for p in order if not p.source)
        copies = [r.leaves for r in self._s.runs]
        for peer in order:
            leaves = self._missing & self._s.known & ~_covered(copies, ENDGAME_COPIES)
            if self._free(peer):
                count = len(self._asks)
                self._ask_run(peer, leaves & ~elsewhere if peer.source else leaves)
                copies += [a.leaves for a in self._asks[count:]]


def _union(sets: Iterable[int]) -> int:
    whole = 0
    for one in sets:
        whole |= one
    return whole


def _covered(sets: Iterable[int], times: int) -> int:
    """What at least so many of the sets have."""
    levels = [0] * times
    for one in sets:
        for level in range(times - 1, 0, -1):
            levels[level] |= levels[level - 1] & one
        levels[0] |= one
    return levels[-1]
