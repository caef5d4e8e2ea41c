"""This machine's network interfaces: what kind each is, how fast, and its addresses.

Addresses and whether an interface is up come from psutil. What an interface is the system says otherwise: Linux by
files under /sys/class/net, macOS by `networksetup -listallhardwareports` (written by its documentation, and not run
on macOS).

Interfaces that are down, and bridges that only this machine's guests are on (docker0, virbr0, macOS's bridge100), are
left out: on another machine the same address is its own bridge, and who is a guest here reaches the others too. A
bridge, bond or VLAN over a physical interface is of that one's kind. Tunnels stay, last: for nodes in different
places they may be the only way.
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

from shoal_common.logs import Log

log = Log("interfaces")

Kind = Literal["thunderbolt", "ethernet", "wifi", "virtual", "loopback"]
RANKS: dict[str, int] = {"thunderbolt": 0, "ethernet": 1, "wifi": 2, "": 3, "virtual": 4, "loopback": 5}
"""Which kind is tried first by others. A kind that is not known is as good as none of the first three."""

_SYS = Path("/sys/class/net")
_ARPHRD_ETHER, _ARPHRD_LOOPBACK = 1, 772
_MAX_STACKED = 8
"""A VLAN on a bridge on a bond: deeper than that nobody looks."""
_PORTS_DEADLINE_S = 5.0
_PORT = re.compile(r"^Hardware Port: (.*)\nDevice: (\S+)$", re.MULTILINE)


class Interface(msgspec.Struct, frozen=True):
    """An interface that is up, with its addresses as `host/prefix`: IPv4 and IPv6, none of them link-local."""

    name: str
    kind: Kind
    mbit: int = 0
    """Mbit/s, 0 where the system does not say."""
    addresses: tuple[str, ...] = ()


class Interfaces:
    """This machine's interfaces as they were when last looked at."""

    def __init__(self, read: Callable[[], tuple[Interface, ...]] | None = None) -> None:
        self._read = read or read_interfaces
        self._seen: tuple[Interface, ...] | None = None

    @property
    def now(self) -> tuple[Interface, ...]:
        """As last looked at; the first time this looks, which takes a few milliseconds."""
        return self.look() if self._seen is None else self._seen

    def look(self) -> tuple[Interface, ...]:
        """Look again. Blocks for milliseconds, on macOS with interfaces that were not there before for longer.

        Where the system does not say, what was seen before stays: a service does not end for it.
        """
        try:
            self._seen = self._read()
        except (OSError, psutil.Error) as e:
            log.warning("this machine's interfaces cannot be read", why=str(e))
            self._seen = self._seen or ()
        return self._seen


def read_interfaces() -> tuple[Interface, ...]:
    """The interfaces that are up, loopback among them, in order of their names. Blocks."""
    up = {name: stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, list[str]] = {}
    for name, addresses in psutil.net_if_addrs().items():
        here = (a for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6))
        found[name] = [text for a in here if (text := with_prefix(a.address, a.netmask))]
    names = sorted(name for name in up if found.get(name))
    kinds = _linux_kinds(names) if sys.platform == "linux" else _macos_kinds(names)
    return tuple(Interface(n, kinds[n], max(up[n], 0), tuple(found[n])) for n in names if n in kinds)


def with_prefix(address: str, netmask: str | None) -> str:
    """`host/prefix` of an address as psutil tells it; "" for one that no other machine could use."""
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
    """What an interface is by its directory in /sys/class/net; None for a bridge that only guests here are on."""
    at = root / name
    if _number(at / "type") == _ARPHRD_LOOPBACK:
        return "loopback"
    if _driver(at) == "thunderbolt-net":
        return "thunderbolt"
    if (at / "wireless").exists() or (at / "phy80211").exists():
        return "wifi"
    if (at / "device").exists() and _number(at / "type") == _ARPHRD_ETHER:
        return "ethernet"
    # Made by software: it is what it stands on. Over several, the slowest kind is all that can be counted on.
    below = sorted(p.name.removeprefix("lower_") for p in at.glob("lower_*")) if depth < _MAX_STACKED else []
    kinds = [kind for kind in (linux_kind(root, n, depth + 1) for n in below) if kind not in (None, "virtual")]
    if kinds:
        return max(kinds, key=lambda kind: RANKS[kind or ""])
    return None if (at / "bridge").exists() else "virtual"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, gone again, or not said by this driver
        return None


def _driver(at: Path) -> str:
    try:
        return (at / "device" / "driver").readlink().name
    except OSError:
        return ""


# macOS

_macos_known: dict[frozenset[str], dict[str, Kind]] = {}
"""What each device was the last time, while the same devices are there: asking takes a process."""


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
        return subprocess.run(command, capture_output=True, text=True, timeout=_PORTS_DEADLINE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        log.warning("interfaces' kinds are guessed by their names", why=str(e))
        return ""


def hardware_ports(text: str) -> dict[str, Kind]:
    """Device → kind, by what `networksetup -listallhardwareports` prints."""
    kinds: dict[str, Kind] = {}
    for port, device in _PORT.findall(text.replace("\r", "")):
        if port in ("Wi-Fi", "AirPort"):
            kinds[device] = "wifi"
        elif port.startswith("Thunderbolt") and "Ethernet" not in port:
            kinds[device] = "thunderbolt"  # "Thunderbolt Bridge", "Thunderbolt 1"; not an adapter in such a port
        elif port.startswith("Bluetooth"):
            kinds[device] = "virtual"  # slower than any other
        else:
            kinds[device] = "ethernet"  # "Ethernet", and adapters under the names of their makers
    return kinds


def macos_kind(device: str, known: Mapping[str, Kind]) -> Kind | None:
    """What a device of macOS is; None for a bridge that only this machine's guests are on."""
    if device in known:
        return known[device]
    if device.startswith("lo"):
        return "loopback"
    if device == "bridge0":
        return "thunderbolt"  # the Thunderbolt Bridge that every Mac has
    if device.startswith(("bridge", "vmenet")):
        return None
    return "ethernet" if device.startswith("en") else "virtual"
