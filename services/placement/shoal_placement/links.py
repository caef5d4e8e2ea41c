"""What a link between two nodes costs a token: as it was measured, or as such links are taken for. Pure.

A node measures its ways to others when placement's answers are asked for (`survey.py`), and keeps the figures in
`state` `links.<node>`. A figure counts as long as both nodes tell the addresses that they told then; after an hour it
is measured anew, when somebody asks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np

from shoal_common.messages.facts import Facts
from shoal_common.messages.records import LinksState, MeasuredLink
from shoal_common.reach import for_others
from shoal_placement.solve.cost import Floats
from shoal_placement.solve.rooms import LINK_S

FRESH_S = 3600.0
FAILED_FRESH_S = 300.0
"""So long a peer that could not be reached is not tried again, and counts as far away."""
UNREACHED_S = 1.0
"""What a link costs over which nobody answered: what can be placed elsewhere is."""
_MOST_S = 10.0
"""Of a link: beyond that all are as useless."""
MOST_PEERS = 64
"""Figures that a node keeps."""
MOST_CANDIDATES = 16
LEAST_S = 1e-4
"""Of a stage's own work with a frame, whatever lies between; and finer than this no link is told from another."""
_LATENCY_S = {"thunderbolt": 5e-4, "wifi": 3e-3}
"""One way, where nothing was measured; of any other kind LINK_S."""
_MBIT = {"thunderbolt": 10_000, "ethernet": 1000, "wifi": 200}
"""Where an interface does not say. A kind that is not here: the bytes are not counted."""
_WORST = ("wifi", "virtual", "", "ethernet", "thunderbolt")


class Way(msgspec.Struct, frozen=True):
    """From one node to another."""

    latency_s: float = LINK_S
    """One way."""
    bytes_per_s: float = 0.0
    """0: not known, and not counted."""
    measured: bool = False

    def cost_s(self, hidden_bytes: int) -> float:
        """Seconds to pass so many bytes. Two digits at most, and no finer than LEAST_S: a link is not known better,
        and nodes whose links are alike have to be seen to be."""
        exact_s = self.latency_s + (hidden_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)
        exact_s = min(exact_s, _MOST_S)
        digits = 1 - math.floor(math.log10(max(exact_s, LEAST_S)))
        return max(round(exact_s, min(digits, 4)), LEAST_S)


class Links:
    """What is known of the ways between nodes at one moment. Made of what they tell when somebody needs it: with many
    nodes that takes a while, and belongs in a thread."""

    def __init__(
        self, states: Iterable[LinksState] = (), fileservers: Mapping[str, Facts] | None = None, now_s: float = 0.0
    ) -> None:
        """`fileservers`: the facts of those that are live."""
        self._states, self._fileservers, self._now_s = list(states), fileservers or {}, now_s

    @cached_property
    def measured(self) -> Mapping[tuple[str, str], Way]:
        """The ways of which there are figures that count."""
        return _measured(self._states, self._fileservers, self._now_s)

    @cached_property
    def told(self) -> Mapping[str, tuple[str, int]]:
        """Of nodes whose data port is known: the kind of the interface that is tried first, and its Mbit/s or 0."""
        first = {node: next(iter(for_others(facts.links)), None) for node, facts in self._fileservers.items()}
        return {node: (link.kind, link.mbit) for node, link in first.items() if link is not None}

    def way(self, a: str, b: str) -> Way:
        """From node `a` to node `b`."""
        return self.measured.get((a, b)) or _guessed(self.told.get(a), self.told.get(b))

    def costs_s(self, nodes: Sequence[str], hidden_bytes: int) -> Floats:
        """`link_s` of a problem over these nodes, in this order."""
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(self.told.get(node) for node in nodes))}
        alike = np.array([[_guessed(a, b).cost_s(hidden_bytes) for b in kinds] for a in kinds])
        here = np.array([kinds[self.told.get(node)] for node in nodes], dtype=np.int64)
        found: Floats = alike[here[:, None], here] if len(nodes) else np.zeros((0, 0))
        places = {node: i for i, node in enumerate(nodes)}
        for (a, b), way in self.measured.items():
            if a in places and b in places:
                found[places[a], places[b]] = way.cost_s(hidden_bytes)
        np.fill_diagonal(found, 0.0)
        return found


def _guessed(a: tuple[str, int] | None, b: tuple[str, int] | None) -> Way:
    if a is None or b is None:
        return Way()
    kind = min((a[0], b[0]), key=lambda k: _WORST.index(k) if k in _WORST else _WORST.index(""))
    mbit = min((m for m in (a[1], b[1]) if m), default=0) or _MBIT.get(kind, 0)
    return Way(_LATENCY_S.get(kind, LINK_S), mbit * 1e6 / 8)


def _measured(
    states: Iterable[LinksState], fileservers: Mapping[str, Facts], now_s: float
) -> dict[tuple[str, str], Way]:
    now_at = {node: at(facts) for node, facts in fileservers.items()}
    tried = {
        (state.node, link.peer): link
        for state in states
        for link in state.links
        if link.ends == f"{now_at.get(state.node)}-{now_at.get(link.peer)}"
    }
    measured = {}
    for a, b in {*tried, *((b, a) for a, b in tried)}:
        there, back = tried.get((a, b)), tried.get((b, a))
        if there is not None and there.error and now_s - there.at_s < FAILED_FRESH_S:
            measured[a, b] = Way(UNREACHED_S, measured=True)
            continue
        answered = [link for link in (back, there) if link is not None and not link.error]
        if answered:
            # What came to b is what b has measured; a round trip is the same from both ends.
            bytes_per_s = next((link.bytes_per_s for link in answered if link.bytes_per_s), 0.0)
            measured[a, b] = Way(min(link.round_trip_s for link in answered) / 2, bytes_per_s, measured=True)
    return measured


def at(facts: Facts) -> str:
    """Stands for the addresses of a node, ports aside: a service that was started anew is where it was."""
    told = [(link.kind, link.address) for link in facts.links] or [("", address) for address in facts.addresses]
    hosts = sorted((kind, address.rpartition(":")[0]) for kind, address in told)
    return hashlib.sha256(msgspec.json.encode(hosts)).hexdigest()[:8]


def ends(one: Facts, other: Facts) -> str:
    """Stands for the addresses of two nodes."""
    return f"{at(one)}-{at(other)}"


def to_measure(
    node: str, peers: Iterable[str], state: LinksState | None, fileservers: Mapping[str, Facts], now_s: float
) -> list[str]:
    """Which of these peers a node has to measure its way to, in the order of their names."""
    if node not in fileservers:
        return []
    fresh = {
        link.peer
        for link in (state.links if state is not None else ())
        if link.peer in fileservers
        and link.ends == ends(fileservers[node], fileservers[link.peer])
        and now_s - link.at_s < (FAILED_FRESH_S if link.error else FRESH_S)
    }
    return sorted({p for p in peers if p != node and fileservers.get(p, Facts()).addresses} - fresh)


def with_found(node: str, state: LinksState | None, found: Sequence[MeasuredLink]) -> LinksState:
    """The record with what was found now: one figure for each peer, the last MOST_PEERS of them."""
    links = {link.peer: link for link in (*(state.links if state is not None else ()), *found)}
    last = sorted(links.values(), key=lambda link: (-link.at_s, link.peer))[:MOST_PEERS]
    return LinksState(node=node, links=sorted(last, key=lambda link: link.peer))


def rate(taken: Sequence[tuple[float, int]]) -> float:
    """Bytes a second of a transfer, from (seconds, bytes so far) in order, seconds rising. Of its later half: before
    that TCP is finding out how much it may send."""
    if not taken:
        return 0.0
    end_s, end_bytes = taken[-1]
    from_s, from_bytes = next((at_s, got) for at_s, got in taken if at_s >= end_s / 2)
    if from_s >= end_s:
        from_s, from_bytes = 0.0, 0
    return (end_bytes - from_bytes) / (end_s - from_s) if end_s > from_s else 0.0
