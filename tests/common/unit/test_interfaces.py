"""The kind of each interface: from Linux's files, from what macOS prints, and on this very machine."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.host.interfaces import (
    KIND_RANKS,
    Interface,
    InterfaceMonitor,
    hardware_ports,
    linux_kind,
    macos_kind,
    read_interfaces,
    with_prefix,
)


class Sys:
    """A directory like /sys/class/net."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, name: str, *directories: str, number: int = 1, driver: str = "", on: tuple[str, ...] = ()) -> None:
        """Add an interface with these subdirectories, type and driver, on top of these others."""
        at = self.root / name
        for directory in ("", *directories):
            (at / directory).mkdir(parents=True)
        (at / "type").write_text(f"{number}\n")
        if driver:
            (at / "device").mkdir(exist_ok=True)
            (at / "device" / "driver").symlink_to(f"/sys/bus/any/drivers/{driver}")
        for below in on:
            (at / f"lower_{below}").symlink_to(f"../{below}")


@pytest.fixture
def net(tmp_path: Path) -> Sys:
    """A machine with one interface of each kind."""
    made = Sys(tmp_path)
    made.add("lo", number=772)
    made.add("enp3s0", driver="igb")
    made.add("enp4s0", driver="virtio_net")
    made.add("thunderbolt0", driver="thunderbolt-net")
    made.add("wlan0", "wireless", "phy80211", driver="iwlwifi")
    made.add("wlp2s0", "phy80211", driver="ath11k_pci")  # a kernel without wireless extensions
    made.add("veth12ab", number=1)
    made.add("tap0", number=1)
    made.add("tun0", number=65534)
    made.add("tailscale0", number=65534)
    made.add("ib0", number=32, driver="mlx5_core")
    made.add("docker0", "bridge", on=("veth12ab",))
    made.add("virbr0", "bridge", on=("tap0",))
    made.add("br-4f2a", "bridge")
    made.add("br0", "bridge", on=("enp3s0", "tap0"))
    made.add("bond0", on=("enp3s0", "enp4s0"))
    made.add("bond1", on=("thunderbolt0", "wlan0"))
    made.add("bond0.7", on=("bond0",))
    made.add("br7", "bridge", on=("bond0.7",))
    return made


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lo", "loopback"),
        ("enp3s0", "ethernet"),
        ("enp4s0", "ethernet"),
        ("thunderbolt0", "thunderbolt"),
        ("wlan0", "wifi"),
        ("wlp2s0", "wifi"),
        ("veth12ab", "virtual"),
        ("tun0", "virtual"),
        ("tailscale0", "virtual"),
        ("docker0", None),
        ("virbr0", None),
        ("br-4f2a", None),
        ("br0", "ethernet"),
        ("bond0", "ethernet"),
        ("bond1", "wifi"),
        ("bond0.7", "ethernet"),
        ("br7", "ethernet"),
        ("pulled-out-meanwhile", "virtual"),
    ],
)
def test_an_interface_of_linux_is_read_from_its_files(net: Sys, name: str, kind: str | None) -> None:
    assert linux_kind(net.root, name) == kind


def test_interfaces_that_stand_on_each_other_in_a_circle_end(net: Sys) -> None:
    net.add("one", on=("two",))
    net.add("two", on=("one",))
    assert linux_kind(net.root, "one") == "virtual"


PORTS = """
Hardware Port: Ethernet
Device: en0
Ethernet Address: 14:98:77:00:00:01

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: 14:98:77:00:00:02

Hardware Port: Bluetooth PAN
Device: en9
Ethernet Address: 14:98:77:00:00:03

Hardware Port: Thunderbolt 1
Device: en2
Ethernet Address: 36:7b:5e:00:00:01

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:7b:5e:00:00:01

Hardware Port: Thunderbolt Ethernet Slot 1
Device: en7
Ethernet Address: 64:4b:f0:00:00:01

Hardware Port: USB 10/100/1000 LAN
Device: en8
Ethernet Address: 00:e0:4c:00:00:01

VLAN Configurations
===================
"""


def test_ports_of_macos_are_what_it_calls_them() -> None:
    known = hardware_ports(PORTS)
    assert known == {
        "en0": "ethernet",
        "en1": "wifi",
        "en9": "virtual",
        "en2": "thunderbolt",
        "bridge0": "thunderbolt",
        "en7": "ethernet",
        "en8": "ethernet",
    }
    assert hardware_ports(PORTS.replace("\n", "\r\n")) == known


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("lo0", "loopback"),
        ("bridge0", "thunderbolt"),
        ("bridge100", None),
        ("vmenet0", None),
        ("en5", "ethernet"),
        ("utun4", "virtual"),
        ("awdl0", "virtual"),
        ("gif0", "virtual"),
    ],
)
def test_a_device_that_macos_does_not_list_is_known_by_its_name(device: str, kind: str | None) -> None:
    assert macos_kind(device, {}) == kind


@given(st.text())
def test_any_tool_output_yields_known_kinds_or_nothing(text: str) -> None:
    assert set(hardware_ports(text).values()) <= set(KIND_RANKS)
    assert set(hardware_ports(f"Hardware Port: {text}\nDevice: en0\n").values()) <= set(KIND_RANKS)


@pytest.mark.parametrize(
    ("address", "netmask", "text"),
    [
        ("192.0.2.2", "255.255.255.0", "192.0.2.2/24"),
        ("100.101.102.103", "255.255.255.255", "100.101.102.103/32"),
        ("10.8.0.1", None, "10.8.0.1/32"),
        ("fd00::2", "ffff:ffff:ffff:ffff::", "fd00::2/64"),
        ("2001:db8::7", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db8::7/128"),
        ("::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "::1/128"),
        ("fe80::1%en0", "ffff:ffff:ffff:ffff::", ""),
        ("169.254.7.8", "255.255.0.0", ""),
        ("0.0.0.0", "0.0.0.0", ""),
        ("no address", "255.255.255.0", ""),
        ("10.8.0.1", "no mask", ""),
    ],
)
def test_an_address_has_its_prefix_and_a_link_local_one_is_none(address: str, netmask: str | None, text: str) -> None:
    assert with_prefix(address, netmask) == text


def test_this_machine_has_loopback_and_only_its_own_addresses() -> None:
    found = read_interfaces()
    assert any(i.kind == "loopback" and "127.0.0.1/8" in i.addresses for i in found)
    all_of_them = {a.address.partition("%")[0] for given_ in psutil.net_if_addrs().values() for a in given_}
    for interface in found:
        assert interface.kind in KIND_RANKS and interface.mbit >= 0
        for address in interface.addresses:
            assert str(ipaddress.ip_interface(address).ip) in all_of_them


def test_interfaces_are_read_again_only_on_refresh() -> None:
    reads = iter([(Interface("a", "ethernet"),), (Interface("b", "wifi"),)])
    seen = InterfaceMonitor(lambda: next(reads))
    assert not seen.current
    assert seen.refresh() == seen.current == (Interface("a", "ethernet"),)
    assert seen.refresh() == seen.current == (Interface("b", "wifi"),)


def test_when_the_system_call_fails_the_last_interfaces_stay() -> None:
    failure = OSError("too many open files")
    answers: list[OSError | tuple[Interface, ...]] = [failure, (Interface("a", "ethernet"),), failure]

    def read() -> tuple[Interface, ...]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    seen = InterfaceMonitor(read)
    assert seen.refresh() == ()
    assert seen.refresh() == seen.refresh() == (Interface("a", "ethernet"),)
