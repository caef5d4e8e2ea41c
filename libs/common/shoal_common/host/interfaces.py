"""This machine's network interfaces: kind, speed and addresses.

psutil gives the addresses and whether an interface is up. Its kind comes from the system: on Linux from
/sys/class/net, on macOS from `networksetup -listallhardwareports` (written by its documentation, and not run on
macOS).

Left out are interfaces that are down, and bridges for this machine's guests only (docker0, virbr0, macOS's
bridge100): on another machine the same address is its own bridge, and a guest here reaches the other addresses too.
A bridge, bond or VLAN over a physical interface has that interface's kind. Tunnels stay, last: between sites they may
be the only way.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from shoal_common.logs import StructuredLogger

log = StructuredLogger("interfaces")

Kind = Literal["thunderbolt", "ethernet", "wifi", "virtual", "loopback"]
KIND_RANKS: dict[str, int] = {"thunderbolt": 0, "ethernet": 1, "wifi": 2, "": 3, "virtual": 4, "loopback": 5}
"""Order in which peers try the kinds. An unknown kind ranks below the first three."""

_SYS = Path("/sys/class/net")
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_MAX_STACKED = 8
"""Depth of stacked interfaces that is followed: a VLAN on a bridge on a bond has three."""
_NETWORKSETUP_TIMEOUT_S = 5.0
_PORT = re.compile(r"^Hardware Port: (.*)\nDevice: (\S+)$", re.MULTILINE)


class Interface(msgspec.Struct, frozen=True):
    """An interface that is up. Addresses are `host/prefix`, IPv4 and IPv6, none of them link-local."""

    name: str
    kind: Kind
    mbit: int = 0
    """Speed in Mbit/s, 0 if the system does not report it."""
    addresses: tuple[str, ...] = ()


class InterfaceMonitor:
    """This machine's interfaces as last read."""

    def __init__(self, read: Callable[[], tuple[Interface, ...]] | None = None) -> None:
        self._read = read or read_interfaces
        self._seen: tuple[Interface, ...] = ()

    @property
    def current(self) -> tuple[Interface, ...]:
        """Interfaces as last read; none before the first `refresh`."""
        return self._seen

    def refresh(self) -> tuple[Interface, ...]:
        """Read the interfaces again. Blocks for milliseconds, on macOS with new interfaces for longer.

        If they cannot be read, the last ones stay: a service does not end because of that.
        """
        try:
            self._seen = self._read()
        except (OSError, psutil.Error) as e:
            log.warning("cannot read this machine's network interfaces", reason=str(e))
        return self._seen


def read_interfaces() -> tuple[Interface, ...]:
    """Return the interfaces that are up, including loopback, sorted by name. Blocks."""
    up = {name: stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup}
    by_name: dict[str, list[str]] = {}
    for name, addresses in psutil.net_if_addrs().items():
        ip_addresses = (a for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6))
        by_name[name] = [text for a in ip_addresses if (text := with_prefix(a.address, a.netmask))]
    names = sorted(name for name in up if by_name.get(name))
    kinds = _linux_kinds(names) if sys.platform == "linux" else _macos_kinds(names)
    return tuple(Interface(n, kinds[n], max(up[n], 0), tuple(by_name[n])) for n in names if n in kinds)


def with_prefix(address: str, netmask: str | None) -> str:
    """Return `host/prefix` for an address as psutil gives it; "" for one that other machines cannot use."""
    try:
        ip = ipaddress.ip_address(address.split("%", maxsplit=1)[0])
        mask = int(ipaddress.ip_address(netmask)) if netmask else (1 << ip.max_prefixlen) - 1
    except ValueError:
        return ""
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return ""
    return f"{ip}/{mask.bit_count()}"


# Linux


def _linux_kinds(names: Iterable[str]) -> dict[str, Kind]:
    kinds = {name: linux_kind(_SYS, name) for name in names}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def linux_kind(root: Path, name: str, depth: int = 0) -> Kind | None:
    """Return an interface's kind from its directory in /sys/class/net; None for a bridge with only guests on it."""
    directory = root / name
    if _number(directory / "type") == _ARPHRD_LOOPBACK:
        return "loopback"
    if _driver(directory) == "thunderbolt-net":
        return "thunderbolt"
    if (directory / "wireless").exists() or (directory / "phy80211").exists():
        return "wifi"
    if (directory / "device").exists() and _number(directory / "type") == _ARPHRD_ETHER:
        return "ethernet"
    # A software interface has the kind of what it stands on; over several, only the slowest can be relied on.
    below = sorted(p.name.removeprefix("lower_") for p in directory.glob("lower_*")) if depth < _MAX_STACKED else []
    kinds = [kind for kind in (linux_kind(root, n, depth + 1) for n in below) if kind not in (None, "virtual")]
    if kinds:
        return max(kinds, key=lambda kind: KIND_RANKS[kind or ""])
    return None if (directory / "bridge").exists() else "virtual"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, just removed, or not supported by this driver
        return None


def _driver(directory: Path) -> str:
    try:
        return (directory / "device" / "driver").readlink().name
    except OSError:
        return ""


# macOS

_macos_known: dict[frozenset[str], dict[str, Kind]] = {}
"""Kind of each device, cached while the set of devices stays the same: reading takes a process."""


def _macos_kinds(names: list[str]) -> dict[str, Kind]:
    key = frozenset(names)
    if key not in _macos_known:
        _macos_known.clear()
        _macos_known[key] = hardware_ports(_list_hardware_ports())
    known = _macos_known[key]
    kinds = {name: macos_kind(name, known) for name in names}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _list_hardware_ports() -> str:
    command = ["/usr/sbin/networksetup", "-listallhardwareports"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_NETWORKSETUP_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as e:
        log.warning("cannot read interface kinds; guessing them from names", reason=str(e))
        return ""


def hardware_ports(text: str) -> dict[str, Kind]:
    """Parse the output of `networksetup -listallhardwareports` into kinds by device."""
    kinds: dict[str, Kind] = {}
    for port, device in _PORT.findall(text.replace("\r", "")):
        if port in ("Wi-Fi", "AirPort"):
            kinds[device] = "wifi"
        elif port.startswith("Thunderbolt") and "Ethernet" not in port:
            kinds[device] = (
                "thunderbolt"  # "Thunderbolt Bridge", "Thunderbolt 1"; not an Ethernet adapter in the port
            )
        elif port.startswith("Bluetooth"):
            kinds[device] = "virtual"  # slower than any other
        else:
            kinds[device] = "ethernet"  # "Ethernet", and adapters under their vendors' names
    return kinds


def macos_kind(device: str, known: Mapping[str, Kind]) -> Kind | None:
    """Return a macOS device's kind; None for a bridge with only this machine's guests on it."""
    if device in known:
        return known[device]
    if device.startswith("lo"):
        return "loopback"
    if device == "bridge0":
        return "thunderbolt"  # the Thunderbolt Bridge that every Mac has
    if device.startswith(("bridge", "vmenet")):
        return None
    return "ethernet" if device.startswith("en") else "virtual"
