"""Which address of a node to use, on both sides: what a node tells, and in which order a peer tries it. Pure.

A node tells its addresses best first: Thunderbolt, Ethernet, Wi-Fi, others, tunnels; within a kind the faster first.
Who asks knows more: its own interfaces. An address in a subnet of its own is on the same wire, by whichever of its
interfaces is of the best kind; one that is in none may be another place's 192.168.1.5, and comes after.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from msgspec import structs

from shoal_common.interfaces import RANKS, Interface
from shoal_common.messages.facts import Link, Live

MAX_LINKS = 16
"""An interface may have many temporary IPv6 addresses; nobody tries more."""
_SHARED = ipaddress.IPv4Network("100.64.0.0/10")
_LOCAL = ipaddress.IPv6Network("fc00::/7")
_SITE_PREFIX = 48

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# What a node tells


def takes_both(bind: str) -> bool:
    """Whether a socket bound to this is to take IPv4 as well as IPv6: `::`. 0.0.0.0 is IPv4 alone."""
    return bind == "::"


def links(bind: str, advertise: Sequence[str], port: int, interfaces: Sequence[Interface]) -> list[Link]:
    """All ways to a data port that listens on `bind`, best first.

    `advertise`, where a person gives it, is all of them, in that order: no kind is told, so nobody sorts it anew.
    """
    if advertise:
        return [Link(address=_address(host, port)) for host in advertise]
    host = "127.0.0.1" if bind == "localhost" else bind
    ip, here = ipaddress.ip_address(host), _hosts(interfaces)
    if not ip.is_unspecified:
        at = here.get(host)
        kind = at.kind if at else "loopback" if ip.is_loopback else ""
        return [_link(host, port, at) if at else Link(address=_address(host, port), kind=kind)]
    hosts = [h for h in here if takes_both(bind) or ":" not in h]
    ranked = sorted(hosts, key=lambda h: (_rank(here[h].kind), -here[h].mbit, here[h].name, ":" in h))
    told = [_link(h, port, here[h]) for h in ranked]
    # Of the loopback ones any will do, but one there must be: the cut is among the others.
    local = [link for link in told if link.kind == "loopback"][:1]
    return [link for link in told if link.kind != "loopback"][:MAX_LINKS] + (
        local or [Link(address=_address("127.0.0.1", port), kind="loopback")]
    )


def for_others(told: Sequence[Link]) -> list[Link]:
    """The links that other machines could use; where there is none, loopback."""
    return [link for link in told if link.kind != "loopback"] or list(told)


def meeting_host(interfaces: Sequence[Interface], bind: str) -> str:
    """The address to tell people for other machines to come to: Ethernet or Wi-Fi, where most can; else the best."""
    here = _hosts(interfaces)
    hosts = [host_of(link.address) for link in links(bind, (), 0, interfaces)]
    named = [str(ip) for ip in hosts if ip is not None]
    return next((h for h in named if h in here and here[h].kind in ("ethernet", "wifi")), named[0])


def _hosts(interfaces: Iterable[Interface]) -> dict[str, Interface]:
    return {address.split("/")[0]: i for i in interfaces for address in i.addresses}


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _link(host: str, port: int, interface: Interface) -> Link:
    return Link(address=_address(host, port), interface=interface.name, kind=interface.kind, mbit=interface.mbit)


def _rank(kind: str) -> int:
    return RANKS.get(kind, RANKS[""])


# What who asks makes of it


def ways(live: Live, network: str, mine: Sequence[Interface]) -> list[Link]:
    """How to reach a service by its liveness facts, in the order to try; empty when it cannot be reached from here.

    `network` is this process's own (`identity.this_network`). A node of an earlier version tells addresses only: they
    are tried as they are.
    """
    told = live.facts.links or [Link(address=a) for a in live.facts.addresses]
    return order(usable(told, same_host=bool(network) and live.holder.network == network), mine)


def usable(told: Iterable[Link], same_host: bool) -> list[Link]:
    """The links that may lead to the node from here: loopback on its own host only; no link-local address.

    What a person has advertised comes without a kind and is believed.
    """
    return [
        link
        for link in told
        if (same_host or link.kind != "loopback") and not (link.kind and _is_link_local(link.address))
    ]


def order(told: Sequence[Link], mine: Sequence[Interface]) -> list[Link]:
    """In the order to try: loopback; what is in a subnet of ours, by the worse kind and speed of the two ends; public
    addresses; tunnels that we are in too; the rest; and what is of an IP version of which we have no address.

    Where the node told of no kinds (a person's SHOAL_ADVERTISE), its order stays.
    """
    if not any(link.kind for link in told):
        return list(told)
    ours = [(network(a), i) for i in mine if i.kind != "loopback" for a in i.addresses]
    versions = {net.version for net, _ in ours}
    if not ours:
        return sorted(told, key=lambda link: link.kind != "loopback")

    def key(link: Link) -> tuple[int, int, int]:
        ip = host_of(link.address)
        if link.kind == "loopback" or ip is None:
            return (0 if ip is not None else 4, 0, 0)
        near = [i for net, i in ours if ip in net]
        if near:
            best = min(near, key=lambda i: (_rank(i.kind), -i.mbit))
            worse = max(_rank(best.kind), _rank(link.kind))
            speed = min((mbit for mbit in (best.mbit, link.mbit) if mbit), default=0)
            return (3 if worse == _rank("virtual") else 1, worse, -speed)
        if ip.version not in versions:
            return (5, 0, 0)
        return (2 if ip.is_global and link.kind != "virtual" else 4, 0, 0)

    return sorted(told, key=key)


def network(address: str) -> _Network:
    """The subnet of an address `host/prefix`.

    Tunnels give each node an address alone, and yet their nodes are together: in 100.64.0.0/10 (Tailscale's, among
    others), or in the /48 of a unique local IPv6 address.
    """
    found = ipaddress.ip_network(address, strict=False)
    if found.prefixlen < found.max_prefixlen:
        return found
    if isinstance(found, ipaddress.IPv4Network):
        return _SHARED if found.subnet_of(_SHARED) else found
    return found.supernet(new_prefix=_SITE_PREFIX) if found.subnet_of(_LOCAL) else found


def facing(told: Sequence[Link], host: str, mine: Sequence[Interface]) -> Link | None:
    """The link to give to somebody who has come to our address `host`: on the same wire, if there is such a one.

    Who asks may be no node, and on one of our networks only. Loopback is for who came by loopback.
    """
    host = host.removeprefix("::ffff:")  # how a socket for both names an IPv4 address
    came_by = [_only(i, host) for i in mine if host in _hosts([i])]
    on_this_machine = any(i.kind == "loopback" for i in came_by)
    return next(iter(order(usable(told, on_this_machine), came_by or mine)), None)


def _only(interface: Interface, host: str) -> Interface:
    return structs.replace(interface, addresses=tuple(a for a in interface.addresses if a.split("/")[0] == host))


def host_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address of `host:port`; None where a name stands there."""
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return None


def _is_link_local(address: str) -> bool:
    ip = host_of(address)
    return ip is not None and ip.is_link_local
