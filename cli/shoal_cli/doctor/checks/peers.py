"""Whether the fileservers and the other ports of all nodes can be reached from here. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, Level, join_names, or_ok
from shoal_cli.doctor.reachability import ConnectError, OsInfo, connect_remedy, describe
from shoal_common.settings.ports import port_ranges

CHECK = "fileservers"
NODE_PORTS = "node ports"
_UNAUTHORIZED = 401


class AddressReach(msgspec.Struct, frozen=True, kw_only=True):
    """One address of a fileserver, and the outcome of asking it for /health."""

    address: str
    error: ConnectError = ""
    reason: str = ""
    status: int = 0

    @property
    def is_good(self) -> bool:
        """Return whether it answers like a fileserver that accepts this node as a peer."""
        return not self.error and self.status == 200


class FileserverReach(msgspec.Struct, frozen=True, kw_only=True):
    """A node's fileserver, seen from here."""

    node: str
    published: Sequence[str]
    """Every address it publishes, also those for its own machine."""
    tried: Sequence[AddressReach]
    """Those that can be meant for this machine, in the order in which a fetcher tries them."""
    is_remote: bool
    """Whether it is on another machine, where our loopback is not its own."""


class PortReach(msgspec.Struct, frozen=True, kw_only=True):
    """A port of another node, and what connecting to it from here showed."""

    node: str
    service: str
    """`gateway`, `stage`, or `stages` for one where nothing listens yet."""
    tried: Sequence[AddressReach]
    """Its addresses that can be meant for this machine."""

    @property
    def is_closed(self) -> bool:
        """Return whether it cannot be reached. Where nothing listens yet, a refusal shows that the way is open."""
        open_for = ("", "refused") if self.service == "stages" else ("",)
        return bool(self.tried) and not any(a.error in open_for for a in self.tried)


def check_ports(ports: Sequence[PortReach], system: OsInfo) -> list[Finding]:
    """Return which ports of other nodes are closed for this one."""
    wrong = []
    for node, service in sorted({(p.node, p.service) for p in ports if p.is_closed}):
        closed = [p for p in ports if (p.node, p.service) == (node, service) and p.is_closed]
        first = closed[0].tried[0]
        numbers = port_ranges(int(p.tried[0].address.rpartition(":")[2]) for p in closed)
        user = "programs here" if service == "gateway" else "stages here"
        what = (
            f"TCP {numbers} of node {node} ({service}) is closed for {user}: {first.address}: "
            f"{describe(first.error, first.reason)}"
        )
        remedy = connect_remedy(first.error, first.address, system, f"the machine of node {node}")
        level: Level = "warning" if service == "gateway" else "problem"
        wrong.append(Finding(NODE_PORTS, level, what, remedy, f"node {node}"))
    nodes = sorted({p.node for p in ports if p.tried})
    return or_ok(NODE_PORTS, wrong, f"open: gateway and stages of {join_names(nodes)}" if nodes else "no other node")


def check(fileservers: Sequence[FileserverReach], node: str, system: OsInfo) -> list[Finding]:
    """Return which of them cannot be reached; `node` is this one."""
    wrong = [f for p in fileservers if (f := _check_one(p, node, system)) is not None]
    own = next((p for p in fileservers if p.node == node), None)
    others = [p.node for p in fileservers if p.is_remote]
    if own is not None and others and all(_is_loopback(a) for a in own.published):
        published = join_names(list(own.published), 2)
        what = f"this node publishes only loopback addresses ({published}), which {join_names(others)} cannot use"
        remedy = "start it with `shoal up --bind 0.0.0.0`, or set SHOAL_ADVERTISE to an address of this machine"
        wrong.append(Finding(CHECK, "problem", what, remedy, f"node {node}"))
    reached = [f"{p.node} at {p.tried[0].address}" for p in fileservers if p.tried]
    if not fileservers:
        return [Finding(CHECK, "ok", "no fileserver is up")]
    note = "; `shoal doctor` there tells whether they reach this node"
    return or_ok(CHECK, wrong, f"reached: {join_names(reached)}{note if others else ''}")


def _check_one(fileserver: FileserverReach, node: str, system: OsInfo) -> Finding | None:
    name = "this node" if fileserver.node == node else f"node {fileserver.node}"
    about = f"node {fileserver.node}"
    if not fileserver.tried:
        if not fileserver.published:
            what, remedy = f"{name} publishes no address", f"`shoal logs fileserver` on {name} says why"
        else:
            published = join_names(list(fileserver.published), 2)
            what = f"{name} publishes only addresses of its own machine ({published})"
            remedy = f"start it with `shoal up --bind 0.0.0.0` on {name}, or set SHOAL_ADVERTISE there"
        return Finding(CHECK, "problem", what, remedy, about)
    first = fileserver.tried[0]
    if first.is_good:
        return None
    good = next((a for a in fileserver.tried if a.is_good), None)
    if good is not None:
        what = f"{name} is reached at {good.address}, but not at the better {first.address}: {_outcome(first)}"
        return Finding(CHECK, "warning", what, _remedy(first, name, system), about)
    tried = "; ".join(f"{a.address}: {_outcome(a)}" for a in fileserver.tried)
    what = f"{name} cannot be reached from here ({tried})"
    return Finding(CHECK, "problem", what, _remedy(first, name, system), about)


def _outcome(tried: AddressReach) -> str:
    if tried.error:
        return describe(tried.error, tried.reason)
    return (
        "it refuses our secret (401)" if tried.status == _UNAUTHORIZED else f"it answers with status {tried.status}"
    )


def _remedy(tried: AddressReach, name: str, system: OsInfo) -> str:
    if tried.error:
        machine = f"the machine of {name}" if name != "this node" else name
        return connect_remedy(tried.error, tried.address, system, machine)
    if tried.status == _UNAUTHORIZED:
        return f"{name} has another secret: join it again with the line that `shoal up` printed on the first node"
    return f"another program may answer there: `shoal doctor` on {name} says who has the port"


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")
