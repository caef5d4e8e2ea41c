"""What a link between two nodes costs a token: as measured, or a default for links of its kind. Pure.

A node measures its links when somebody asks for a placement (`survey.py`), and keeps the figures in `state`
`links.<node>`. A figure counts while both nodes publish the same addresses as then; after an hour the link is
measured again when somebody asks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np

from shoal_common.host.addresses import non_loopback
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.placement import LinksState, MeasuredLink
from shoal_placement.solver.build_problem import DEFAULT_LINK_S
from shoal_placement.solver.cost import Floats

MEASUREMENT_MAX_AGE_S = 3600.0
FAILED_MEASUREMENT_MAX_AGE_S = 300.0
"""A peer that could not be reached is not tried again for this long, and its link costs UNREACHED_S."""
UNREACHABLE_COST_S = 1.0
"""Cost of a link to a peer that did not answer: whatever can be placed elsewhere is."""
_MAX_COST_S = 10.0
"""Links that cost more are equally useless."""
MAX_PEERS = 64
"""Peers whose figures a node keeps."""
MAX_CANDIDATES = 16
MIN_COST_S = 1e-4
"""Least cost of a link: a stage's own work with a frame. Links are not distinguished any finer than this."""
_LATENCY_S = {"thunderbolt": 5e-4, "wifi": 3e-3}
"""One-way latency of links that were not measured; LINK_S for other kinds."""
_MBIT = {"thunderbolt": 10_000, "ethernet": 1000, "wifi": 200}
"""Used if the interface does not report its speed. For other kinds the bytes are not counted."""
_WORST = ("wifi", "virtual", "", "ethernet", "thunderbolt")


class NodeLink(msgspec.Struct, frozen=True):
    """The link from one node to another."""

    latency_s: float = DEFAULT_LINK_S
    """One way."""
    bytes_per_s: float = 0.0
    """0: unknown, and not counted."""
    measured: bool = False

    def cost_s(self, hidden_bytes: int) -> float:
        """Return the seconds to send so many bytes, with two digits at most and no finer than LEAST_S.

        A link is not known any better, and nodes with similar links have to be recognized as alike.
        """
        exact_s = self.latency_s + (hidden_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)
        exact_s = min(exact_s, _MAX_COST_S)
        digits = 1 - math.floor(math.log10(max(exact_s, MIN_COST_S)))
        return max(round(exact_s, min(digits, 4)), MIN_COST_S)


class NetworkModel:
    """The links between nodes, computed when they are first needed: with many nodes that takes a while, so do it in a
    thread."""

    def __init__(
        self,
        states: Iterable[LinksState] = (),
        fileservers: Mapping[str, NodeFacts] | None = None,
        now_s: float = 0.0,
    ) -> None:
        """`fileservers`: the facts of the live fileservers, by node."""
        self._states, self._fileservers, self._now_s = list(states), fileservers or {}, now_s

    @cached_property
    def measured_links(self) -> Mapping[tuple[str, str], NodeLink]:
        """The links whose measurements count, by (from, to)."""
        return _measured(self._states, self._fileservers, self._now_s)

    @cached_property
    def interface_by_node(self) -> Mapping[str, tuple[str, int]]:
        """For each node with a known data port: the kind of its preferred interface, and the Mbit/s of that, or 0."""
        preferred = {node: next(iter(non_loopback(facts.links)), None) for node, facts in self._fileservers.items()}
        return {node: (link.kind, link.mbit) for node, link in preferred.items() if link is not None}

    def link_between(self, a: str, b: str) -> NodeLink:
        """Return the link from node `a` to node `b`."""
        return self.measured_links.get((a, b)) or _default(
            self.interface_by_node.get(a), self.interface_by_node.get(b)
        )

    def link_costs_s(self, nodes: Sequence[str], hidden_bytes: int) -> Floats:
        """Return `link_s` of a problem over these nodes, in this order."""
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(self.interface_by_node.get(node) for node in nodes))}
        by_kind = np.array([[_default(a, b).cost_s(hidden_bytes) for b in kinds] for a in kinds])
        kind_of = np.array([kinds[self.interface_by_node.get(node)] for node in nodes], dtype=np.int64)
        costs_s: Floats = by_kind[kind_of[:, None], kind_of] if len(nodes) else np.zeros((0, 0))
        index = {node: i for i, node in enumerate(nodes)}
        for (a, b), link in self.measured_links.items():
            if a in index and b in index:
                costs_s[index[a], index[b]] = link.cost_s(hidden_bytes)
        np.fill_diagonal(costs_s, 0.0)
        return costs_s


def _default(a: tuple[str, int] | None, b: tuple[str, int] | None) -> NodeLink:
    if a is None or b is None:
        return NodeLink()
    kind = min((a[0], b[0]), key=lambda k: _WORST.index(k) if k in _WORST else _WORST.index(""))
    mbit = min((m for m in (a[1], b[1]) if m), default=0) or _MBIT.get(kind, 0)
    return NodeLink(_LATENCY_S.get(kind, DEFAULT_LINK_S), mbit * 1e6 / 8)


def _measured(
    states: Iterable[LinksState], fileservers: Mapping[str, NodeFacts], now_s: float
) -> dict[tuple[str, str], NodeLink]:
    addresses = {node: address_digest(facts) for node, facts in fileservers.items()}
    tried = {
        (state.node, link.peer): link
        for state in states
        for link in state.links
        if link.addresses_fingerprint == f"{addresses.get(state.node)}-{addresses.get(link.peer)}"
    }
    measured = {}
    for a, b in {*tried, *((b, a) for a, b in tried)}:
        outward, return_link = tried.get((a, b)), tried.get((b, a))
        if outward is not None and outward.error and now_s - outward.measured_at_s < FAILED_MEASUREMENT_MAX_AGE_S:
            measured[a, b] = NodeLink(UNREACHABLE_COST_S, measured=True)
            continue
        answered = [link for link in (return_link, outward) if link is not None and not link.error]
        if answered:
            # b has measured what it receives from a; a round trip is the same from both ends.
            bytes_per_s = next((link.bytes_per_s for link in answered if link.bytes_per_s), 0.0)
            measured[a, b] = NodeLink(min(link.round_trip_s for link in answered) / 2, bytes_per_s, measured=True)
    return measured


def address_digest(facts: NodeFacts) -> str:
    """Return a digest of a node's addresses without ports: a service that was restarted has the same one."""
    published = [(link.kind, link.address) for link in facts.links] or [("", address) for address in facts.addresses]
    hosts = sorted((kind, address.rpartition(":")[0]) for kind, address in published)
    return hashlib.sha256(msgspec.json.encode(hosts)).hexdigest()[:8]


def link_digest(own: NodeFacts, peer: NodeFacts) -> str:
    """Return a digest of the addresses of two nodes."""
    return f"{address_digest(own)}-{address_digest(peer)}"


def peers_to_measure(
    node: str, peers: Iterable[str], state: LinksState | None, fileservers: Mapping[str, NodeFacts], now_s: float
) -> list[str]:
    """Return the peers whose link a node has to measure, in the order of their names."""
    if node not in fileservers:
        return []
    fresh_peers = {
        link.peer
        for link in (state.links if state is not None else ())
        if link.peer in fileservers
        and link.addresses_fingerprint == link_digest(fileservers[node], fileservers[link.peer])
        and now_s - link.measured_at_s < (FAILED_MEASUREMENT_MAX_AGE_S if link.error else MEASUREMENT_MAX_AGE_S)
    }
    return sorted({p for p in peers if p != node and fileservers.get(p, NodeFacts()).addresses} - fresh_peers)


def with_measurements(node: str, state: LinksState | None, measured: Sequence[MeasuredLink]) -> LinksState:
    """Return the record with new measurements: one for each peer, the latest MOST_PEERS (I7)."""
    links = {link.peer: link for link in (*(state.links if state is not None else ()), *measured)}
    latest = sorted(links.values(), key=lambda link: (-link.measured_at_s, link.peer))[:MAX_PEERS]
    return LinksState(node=node, links=sorted(latest, key=lambda link: link.peer))


def transfer_rate(samples: Sequence[tuple[float, int]]) -> float:
    """Return the bytes per second of a transfer, from samples of (seconds, bytes so far) in order.

    Only its later half counts: before that TCP is still increasing its rate.
    """
    if not samples:
        return 0.0
    end_s, end_bytes = samples[-1]
    from_s, from_bytes = next((at_s, got_bytes) for at_s, got_bytes in samples if at_s >= end_s / 2)
    if from_s >= end_s:
        from_s, from_bytes = 0.0, 0
    return (end_bytes - from_bytes) / (end_s - from_s) if end_s > from_s else 0.0
