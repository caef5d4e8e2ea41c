"""Which address of a node to use: what a node publishes, and in which order a peer tries it. Pure.

A node publishes its addresses best first: Thunderbolt, Ethernet, Wi-Fi, others, tunnels; within a kind the faster
first. A peer also knows its own interfaces: an address in one of its subnets is on the same link, over the best of
its interfaces there; an address in none of them may be another site's 192.168.1.5, and comes later.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from msgspec import structs

from shoal_common.host.interfaces import KIND_RANKS, Interface
from shoal_common.messages.liveness import LivenessRecord, NodeAddress

MAX_LINKS = 16
"""An interface may have many temporary IPv6 addresses; no more are tried."""
_SHARED = ipaddress.IPv4Network("100.64.0.0/10")
_LOCAL = ipaddress.IPv6Network("fc00::/7")
_SITE_PREFIX = 48

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# What a node publishes


def is_dual_stack(bind: str) -> bool:
    """Return whether a socket bound to this address accepts IPv4 and IPv6: `::`. 0.0.0.0 is IPv4 only."""
    return bind == "::"


def published_addresses(
    bind: str, advertise: Sequence[str], port: int, interfaces: Sequence[Interface]
) -> list[NodeAddress]:
    """Return all addresses of a data port that listens on `bind`, best first.

    `advertise`, if a person set it, is the complete list in their order; it has no kinds, so no peer reorders it.
    """
    if advertise:
        return [NodeAddress(address=_address(host, port)) for host in advertise]
    host = "127.0.0.1" if bind == "localhost" else bind
    ip, by_host = ipaddress.ip_address(host), _hosts(interfaces)
    if not ip.is_unspecified:
        interface = by_host.get(host)
        kind = interface.kind if interface else "loopback" if ip.is_loopback else ""
        return [_link(host, port, interface) if interface else NodeAddress(address=_address(host, port), kind=kind)]
    hosts = [h for h in by_host if is_dual_stack(bind) or ":" not in h]
    ranked = sorted(hosts, key=lambda h: (_rank(by_host[h].kind), -by_host[h].mbit, by_host[h].name, ":" in h))
    ranked_links = [_link(h, port, by_host[h]) for h in ranked]
    # Any loopback address will do, but there has to be one: only the others are cut.
    loopback = [link for link in ranked_links if link.kind == "loopback"][:1]
    return [link for link in ranked_links if link.kind != "loopback"][:MAX_LINKS] + (
        loopback or [NodeAddress(address=_address("127.0.0.1", port), kind="loopback")]
    )


def non_loopback(published: Sequence[NodeAddress]) -> list[NodeAddress]:
    """Return the links that other machines can use; loopback if there are none."""
    return [link for link in published if link.kind != "loopback"] or list(published)


def join_host(interfaces: Sequence[Interface], bind: str) -> str:
    """Return the address that other machines should join at: Ethernet or Wi-Fi if there is one, else the best."""
    by_host = _hosts(interfaces)
    hosts = [host_of(link.address) for link in published_addresses(bind, (), 0, interfaces)]
    named = [str(ip) for ip in hosts if ip is not None]
    return next((h for h in named if h in by_host and by_host[h].kind in ("ethernet", "wifi")), named[0])


def _hosts(interfaces: Iterable[Interface]) -> dict[str, Interface]:
    return {address.split("/")[0]: i for i in interfaces for address in i.addresses}


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _link(host: str, port: int, interface: Interface) -> NodeAddress:
    return NodeAddress(
        address=_address(host, port), interface=interface.name, kind=interface.kind, mbit=interface.mbit
    )


def _rank(kind: str) -> int:
    return KIND_RANKS.get(kind, KIND_RANKS[""])


# What a peer makes of it


def reachable_addresses(live: LivenessRecord, network: str, own_interfaces: Sequence[Interface]) -> list[NodeAddress]:
    """Return the addresses of a live service in the order to try; empty if it cannot be reached from here.

    `network` is this process's own (`process_identity.this_network`). Nodes of an earlier version publish addresses
    only; their order stays.
    """
    published = live.facts.links or [NodeAddress(address=a) for a in live.facts.addresses]
    return sort_by_preference(
        filter_reachable(published, same_host=bool(network) and live.holder.network_namespace == network),
        own_interfaces,
    )


def filter_reachable(published: Iterable[NodeAddress], same_host: bool) -> list[NodeAddress]:
    """Return the links that may lead to the node: loopback only on the same host, and no link-local address.

    Addresses that a person advertised have no kind and are always kept.
    """
    return [
        link
        for link in published
        if (same_host or link.kind != "loopback") and not (link.kind and _is_link_local(link.address))
    ]


def sort_by_preference(published: Sequence[NodeAddress], own_interfaces: Sequence[Interface]) -> list[NodeAddress]:
    """Sort links in the order to try: loopback; those in our subnets, by the worse kind and speed of both ends;
    public addresses; tunnels that we are in too; the rest; last, IP versions of which we have no address.

    Without kinds (a person's SHOAL_ADVERTISE), the published order stays.
    """
    if not any(link.kind for link in published):
        return list(published)
    own_networks = [(subnet_of(a), i) for i in own_interfaces if i.kind != "loopback" for a in i.addresses]
    versions = {net.version for net, _ in own_networks}
    if not own_networks:
        return sorted(published, key=lambda link: link.kind != "loopback")

    def key(link: NodeAddress) -> tuple[int, int, int]:
        ip = host_of(link.address)
        if link.kind == "loopback" or ip is None:
            return (0 if ip is not None else 4, 0, 0)
        near = [i for net, i in own_networks if ip in net]
        if near:
            best = min(near, key=lambda i: (_rank(i.kind), -i.mbit))
            worse = max(_rank(best.kind), _rank(link.kind))
            speed = min((mbit for mbit in (best.mbit, link.mbit) if mbit), default=0)
            return (3 if worse == _rank("virtual") else 1, worse, -speed)
        if ip.version not in versions:
            return (5, 0, 0)
        return (2 if ip.is_global and link.kind != "virtual" else 4, 0, 0)

    return sorted(published, key=key)


def subnet_of(address: str) -> _Network:
    """Return the subnet of an address `host/prefix`.

    Tunnels give each node a single address, and yet their nodes share a network: 100.64.0.0/10 (Tailscale and
    others), or the /48 of a unique local IPv6 address.
    """
    subnet = ipaddress.ip_network(address, strict=False)
    if subnet.prefixlen < subnet.max_prefixlen:
        return subnet
    if isinstance(subnet, ipaddress.IPv4Network):
        return _SHARED if subnet.subnet_of(_SHARED) else subnet
    return subnet.supernet(new_prefix=_SITE_PREFIX) if subnet.subnet_of(_LOCAL) else subnet


def address_for_caller(
    published: Sequence[NodeAddress], host: str, own_interfaces: Sequence[Interface]
) -> NodeAddress | None:
    """Return the link to give to a caller that connected to our address `host`: on the same link, if there is one.

    The caller may be no node, and on only one of our networks. Loopback is for callers that came by loopback.
    """
    host = host.removeprefix("::ffff:")  # how a dual-stack socket writes an IPv4 address
    came_by = [_only(i, host) for i in own_interfaces if host in _hosts([i])]
    on_this_machine = any(i.kind == "loopback" for i in came_by)
    return next(
        iter(sort_by_preference(filter_reachable(published, on_this_machine), came_by or own_interfaces)), None
    )


def _only(interface: Interface, host: str) -> Interface:
    return structs.replace(interface, addresses=tuple(a for a in interface.addresses if a.split("/")[0] == host))


def host_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the IP address of `host:port`; None if the host is a name."""
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return None


def _is_link_local(address: str) -> bool:
    ip = host_of(address)
    return ip is not None and ip.is_link_local
