"""Whether the fileservers of all nodes are reached from here. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, listed, or_ok
from shoal_cli.doctor.reaching import System, Trouble, in_words, remedy

CHECK = "fileservers"
_UNAUTHORIZED = 401


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One address of a fileserver, and what asking it for /health has shown."""

    address: str
    trouble: Trouble = ""
    why: str = ""
    status: int = 0

    @property
    def good(self) -> bool:
        """Whether it answers as a fileserver does that takes us for a peer."""
        return not self.trouble and self.status == 200


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A node's fileserver, seen from here."""

    node: str
    told: Sequence[str]
    """Every address that it says, to others and to its own machine."""
    ways: Sequence[Way]
    """Those that can be meant for us, in the order to try."""
    elsewhere: bool
    """Whether it is on another machine, where our loopback is not its own."""


def judge(peers: Sequence[Peer], node: str, system: System) -> list[Finding]:
    """Which of them are not reached; `node` is this one."""
    wrong = [f for p in peers if (f := _peer(p, node, system)) is not None]
    me = next((p for p in peers if p.node == node), None)
    others = [p.node for p in peers if p.elsewhere]
    if me is not None and others and all(_is_loopback(a) for a in me.told):
        told = listed(list(me.told), 2)
        what = f"this node tells only loopback addresses ({told}), which {listed(others)} cannot use"
        rebind = "start it with `shoal up --bind 0.0.0.0`, or set SHOAL_ADVERTISE to an address of this machine"
        wrong.append(Finding(CHECK, "problem", what, rebind, f"node {node}"))
    reached = [f"{p.node} at {p.ways[0].address}" for p in peers if p.ways]
    if not peers:
        return [Finding(CHECK, "ok", "no fileserver is live")]
    note = "; whether they reach this node, `shoal doctor` there says"
    return or_ok(CHECK, wrong, f"reached: {listed(reached)}{note if others else ''}")


def _peer(peer: Peer, node: str, system: System) -> Finding | None:
    there = "this node" if peer.node == node else f"node {peer.node}"
    about = f"node {peer.node}"
    if not peer.ways:
        if not peer.told:
            what, then = f"{there} tells no address", f"`shoal logs fileserver` on {there} says why"
        else:
            what = f"{there} tells only addresses of its own machine ({listed(list(peer.told), 2)})"
            then = f"start it with `shoal up --bind 0.0.0.0` on {there}, or set SHOAL_ADVERTISE there"
        return Finding(CHECK, "problem", what, then, about)
    first = peer.ways[0]
    if first.good:
        return None
    good = next((w for w in peer.ways if w.good), None)
    if good is not None:
        what = f"{there} is reached at {good.address}, but not at {first.address}, which is better: {_how(first)}"
        return Finding(CHECK, "warning", what, _remedy(first, there, system), about)
    tried = "; ".join(f"{w.address}: {_how(w)}" for w in peer.ways)
    return Finding(
        CHECK, "problem", f"{there} is not reached from here ({tried})", _remedy(first, there, system), about
    )


def _how(way: Way) -> str:
    if way.trouble:
        return in_words(way.trouble, way.why)
    return "it refuses our secret (401)" if way.status == _UNAUTHORIZED else f"it answers with status {way.status}"


def _remedy(way: Way, there: str, system: System) -> str:
    if way.trouble:
        return remedy(way.trouble, way.address, system, f"the machine of {there}" if there != "this node" else there)
    if way.status == _UNAUTHORIZED:
        return f"{there} has another secret: join it again with the line that `shoal up` printed on the first node"
    return f"what answers there may be another program: `shoal doctor` on {there} says who has the port"


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
