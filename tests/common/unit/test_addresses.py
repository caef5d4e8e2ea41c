"""Which addresses a node publishes, and which one is tried first."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.host.addresses import (
    MAX_LINKS,
    address_for_caller,
    filter_reachable,
    host_of,
    join_host,
    non_loopback,
    published_addresses,
    reachable_addresses,
    sort_by_preference,
    subnet_of,
)
from shoal_common.host.interfaces import KIND_RANKS, Interface, Kind
from shoal_common.messages.liveness import LivenessRecord, NodeAddress, NodeFacts, ProcessIdentity

LO = Interface("lo", "loopback", 0, ("127.0.0.1/8", "::1/128"))
ETH = Interface("eth0", "ethernet", 1000, ("192.168.1.5/24", "fd12::5/64"))
FAST = Interface("eth1", "ethernet", 10000, ("10.0.0.5/24",))
WIFI = Interface("wlan0", "wifi", 600, ("192.168.2.5/24", "2001:db8:2::5/64"))
TB = Interface("thunderbolt0", "thunderbolt", 0, ("10.9.0.5/30",))
TUNNEL = Interface("tailscale0", "virtual", 0, ("100.70.0.5/32", "fd7a:115c:a1e0::5/128"))
ALL = (ETH, FAST, LO, TUNNEL, TB, WIFI)


def published_links(*interfaces: Interface, bind: str = "::", advertise: tuple[str, ...] = ()) -> list[NodeAddress]:
    return published_addresses(bind, advertise, 7000, interfaces)


def hosts(found: list[NodeAddress]) -> list[str]:
    return [link.address.rpartition(":")[0].strip("[]") for link in found]


def test_a_nodes_addresses_are_sorted_by_kind_and_speed() -> None:
    assert hosts(published_links(*ALL)) == [
        "10.9.0.5",
        "10.0.0.5",
        "192.168.1.5",
        "fd12::5",
        "192.168.2.5",
        "2001:db8:2::5",
        "100.70.0.5",
        "fd7a:115c:a1e0::5",
        "127.0.0.1",
    ]
    first, second = published_links(*ALL)[:2]
    assert first == NodeAddress(address="10.9.0.5:7000", interface="thunderbolt0", kind="thunderbolt")
    assert second == NodeAddress(address="10.0.0.5:7000", interface="eth1", kind="ethernet", mbit=10000)
    assert "127.0.0.1" not in hosts(non_loopback(published_links(*ALL)))


def test_on_0_0_0_0_no_ipv6_address_is_published() -> None:
    assert all(":" not in host for host in hosts(published_links(*ALL, bind="0.0.0.0")))


@pytest.mark.parametrize("bind", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_only_loopback_is_published(bind: str) -> None:
    (link,) = published_links(*ALL, bind=bind)
    assert link.kind == "loopback" and non_loopback([link]) == [link]
    assert published_links(bind=bind)[0].kind == "loopback"


def test_a_bound_address_is_published_with_its_interface() -> None:
    (link,) = published_links(*ALL, bind="10.0.0.5")
    assert link == NodeAddress(address="10.0.0.5:7000", interface="eth1", kind="ethernet", mbit=10000)
    assert published_links(*ALL, bind="10.0.0.6") == [NodeAddress(address="10.0.0.6:7000")]


def test_a_machine_without_any_interface_has_loopback() -> None:
    assert published_links(LO) == published_links() or hosts(published_links(LO)) == hosts(published_links()) == [
        "127.0.0.1"
    ]


def test_advertised_addresses_are_published_and_tried_in_order() -> None:
    advertised = ("169.254.3.4", "wifi.example", "100.70.0.5", "10.9.0.5", "127.0.0.1")
    given_ = published_links(*ALL, advertise=advertised)
    assert tuple(hosts(given_)) == advertised
    assert tuple(hosts(sort_by_preference(filter_reachable(given_, same_host=False), ALL))) == advertised


def test_many_temporary_addresses_are_cut_and_loopback_stays() -> None:
    many = Interface("eth0", "ethernet", 0, tuple(f"2001:db8::{n:x}/64" for n in range(1, 60)))
    found = published_links(many, LO)
    assert len(found) == MAX_LINKS + 1 and found[-1].kind == "loopback"


def test_loopback_is_for_the_same_host_and_link_local_for_nobody() -> None:
    given_ = [
        *published_links(ETH, LO),
        NodeAddress(address="169.254.3.4:7000", kind="thunderbolt"),
        NodeAddress(address="[fe80::1]:1", kind="x"),
    ]
    assert hosts(filter_reachable(given_, same_host=False)) == ["192.168.1.5", "fd12::5"]
    assert hosts(filter_reachable(given_, same_host=True)) == ["192.168.1.5", "fd12::5", "127.0.0.1"]


def own_interface(name: str, kind: Kind, *addresses: str, mbit: int = 0) -> Interface:
    return Interface(name, kind, mbit, addresses)


@pytest.mark.parametrize(
    ("here", "first"),
    [
        (
            [own_interface("tb", "thunderbolt", "10.9.0.6/30"), own_interface("e", "ethernet", "192.168.1.6/24")],
            "10.9.0.5",
        ),
        ([own_interface("e", "ethernet", "192.168.1.6/24")], "192.168.1.5"),
        (
            [
                own_interface("e", "ethernet", "192.168.1.6/24"),
                own_interface("f", "ethernet", "10.0.0.6/24", mbit=2500),
            ],
            "10.0.0.5",
        ),
        (
            [own_interface("w", "wifi", "192.168.1.6/24"), own_interface("f", "ethernet", "10.0.0.6/24", mbit=10)],
            "10.0.0.5",
        ),
        ([own_interface("w", "wifi", "192.168.2.6/24")], "192.168.2.5"),
        # In none of its subnets: a public address is certainly the node's own, then the tunnel that both are in.
        (
            [
                own_interface("e", "ethernet", "172.16.0.6/24", "2a00::6/64"),
                own_interface("t", "virtual", "100.99.1.1/32"),
            ],
            "2a00:2::5",
        ),
        (
            [own_interface("e", "ethernet", "172.16.0.6/24"), own_interface("t", "virtual", "100.99.1.1/32")],
            "100.70.0.5",
        ),
        # Neither: in the order in which the node publishes them.
        ([own_interface("e", "ethernet", "172.16.0.6/24")], "10.9.0.5"),
        ([own_interface("e", "ethernet", "fd99::6/64")], "2a00:2::5"),
        ([own_interface("e", "ethernet", "fd12::6/64")], "fd12::5"),
        ([], "10.9.0.5"),
    ],
)
def test_the_address_on_a_wire_that_both_are_on_comes_first(here: list[Interface], first: str) -> None:
    wifi = Interface("wlan0", "wifi", 600, ("192.168.2.5/24", "2a00:2::5/64"))
    found = published_links(ETH, FAST, TUNNEL, TB, wifi, LO)
    assert hosts(sort_by_preference(filter_reachable(found, same_host=False), here))[0] == first
    assert hosts(sort_by_preference(filter_reachable(found, same_host=True), here))[0] == "127.0.0.1"


KINDS = sorted(KIND_RANKS)
LINKS = st.builds(
    NodeAddress,
    address=st.one_of(
        st.ip_addresses(v=4).map(lambda ip: f"{ip}:7000"),
        st.ip_addresses(v=6).map(lambda ip: f"[{ip}]:7000"),
        st.just("name:7000"),
        st.text(max_size=10),
    ),
    interface=st.sampled_from(["eth0", "wlan0"]),
    kind=st.sampled_from([*KINDS, "of next year"]),
    mbit=st.sampled_from([0, 100, 10000]),
)
PREFIXES = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.integers(8, 32)), st.tuples(st.ip_addresses(v=6), st.integers(32, 128))
).map(lambda pair: f"{pair[0]}/{pair[1]}")
INTERFACES = st.lists(
    st.builds(
        Interface,
        name=st.sampled_from("abc"),
        kind=st.sampled_from([k for k in KINDS if k]),
        mbit=st.sampled_from([0, 100, 10000]),
        addresses=st.lists(PREFIXES, max_size=3).map(tuple),
    ),
    max_size=4,
)


@given(st.lists(LINKS, max_size=8), INTERFACES)
def test_sorting_addresses_is_idempotent_and_keeps_all(found: list[NodeAddress], here: list[Interface]) -> None:
    ordered = sort_by_preference(found, here)
    assert sorted(ordered, key=repr) == sorted(found, key=repr)
    assert sort_by_preference(ordered, here) == ordered


@given(st.lists(LINKS, max_size=8), INTERFACES)
def test_peers_on_one_of_our_networks_come_before_others(found: list[NodeAddress], here: list[Interface]) -> None:
    wires = [subnet_of(a) for i in here if i.kind not in ("loopback", "virtual") for a in i.addresses]
    kinds = ("thunderbolt", "ethernet", "wifi")
    given_ = [link for link in found if link.kind in kinds]

    def near(link: NodeAddress) -> bool:
        ip = host_of(link.address)
        return ip is not None and any(ip in w for w in wires)

    flags = [near(link) for link in sort_by_preference(given_, here)]
    assert flags == sorted(flags, reverse=True)


@given(st.lists(LINKS, max_size=8), st.booleans())
def test_nobody_is_given_another_machines_loopback(found: list[NodeAddress], same_host: bool) -> None:
    left = filter_reachable(found, same_host)
    assert all(link in found for link in left)
    assert same_host or all(link.kind != "loopback" for link in left)


@given(PREFIXES)
def test_a_subnet_holds_its_own_address(address: str) -> None:
    assert ipaddress.ip_interface(address).ip in subnet_of(address)


def live(facts: NodeFacts, host_network: str = "boot/1") -> LivenessRecord:
    return LivenessRecord(
        holder=ProcessIdentity(uid="u", host="h", pid=1, network_namespace=host_network), version="1", facts=facts
    )


def test_a_node_of_an_earlier_version_is_tried_in_its_own_order() -> None:
    old = live(NodeFacts(addresses=["127.0.0.1:1", "169.254.0.1:2", "what.ever:3"]), "")
    assert [w.address for w in reachable_addresses(old, "", [ETH])] == ["127.0.0.1:1", "169.254.0.1:2", "what.ever:3"]


def test_a_node_on_loopback_is_reached_in_its_own_network_only() -> None:
    there = live(NodeFacts(links=published_links(LO, bind="127.0.0.1")))
    assert [w.kind for w in reachable_addresses(there, "boot/1", ALL)] == ["loopback"]
    assert reachable_addresses(there, "boot/2", ALL) == [] == reachable_addresses(live(there.facts, ""), "", ALL)


@pytest.mark.parametrize(
    ("came_to", "answer"),
    [
        ("192.168.1.6", "192.168.1.5:7000"),
        ("::ffff:192.168.2.6", "192.168.2.5:7000"),
        ("fd12::6", "[fd12::5]:7000"),
        ("127.0.0.1", "127.0.0.1:7000"),
        ("", "10.9.0.5:7000"),
    ],
)
def test_a_caller_on_one_network_is_given_an_address_on_it(came_to: str, answer: str) -> None:
    here = [
        LO,
        own_interface("tb", "thunderbolt", "10.9.0.6/30"),
        own_interface("e", "ethernet", "192.168.1.6/24", "fd12::6/64"),
        own_interface("w", "wifi", "192.168.2.6/24"),
    ]
    found = address_for_caller(published_links(*ALL), came_to, here)
    assert found is not None and found.address == answer


def test_nobody_is_given_an_address_only_its_own_machine_reaches() -> None:
    assert address_for_caller(published_links(LO, bind="127.0.0.1"), "192.168.1.6", [LO, ETH]) is None


def test_people_are_given_the_address_that_most_can_reach() -> None:
    assert join_host(ALL, "0.0.0.0") == "10.0.0.5"
    assert join_host((TB, WIFI, LO), "0.0.0.0") == "192.168.2.5"
    assert join_host((TB, LO), "0.0.0.0") == "10.9.0.5"
    assert join_host((LO,), "0.0.0.0") == "127.0.0.1"
