"""Why an address cannot be reached, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from shoal_common.host.addresses import host_of, subnet_of
from shoal_common.host.interfaces import Interface

ConnectError = Literal["", "refused", "timeout", "no_route", "unknown_host", "no_reply", "broken"]
"""refused: nothing listens there. timeout: no answer at all. no_route: the system has no route. unknown_host: the
name cannot be resolved. no_reply: it accepts the connection and sends nothing. broken: connected, then an unexpected
end."""

MACOS_WITH_LOCAL_NETWORK = 15


class OsInfo(msgspec.Struct, frozen=True):
    """What of this machine matters for reaching others."""

    name: str = "linux"
    """sys.platform."""
    major: int = 0
    """macOS: the first number of its version."""
    interfaces: tuple[Interface, ...] = ()


def local_network_denied(error: ConnectError, address: str, system: OsInfo) -> bool:
    """Return whether macOS seems to deny the local network: no route to a host on a network of this machine.

    macOS 15 and later fail such connections with EHOSTUNREACH. Where the address is on no network of this machine,
    the route may really be missing.
    """
    if system.name != "darwin" or system.major < MACOS_WITH_LOCAL_NETWORK or error != "no_route":
        return False
    return _is_local(address, system.interfaces)


def _is_local(address: str, interfaces: Sequence[Interface]) -> bool:
    ip = host_of(address)
    return ip is not None and any(ip in subnet_of(a) for i in interfaces if i.kind != "loopback" for a in i.addresses)


def describe(error: ConnectError, reason: str) -> str:
    """Return how the attempt ended."""
    return {
        "refused": "nothing listens there",
        "timeout": "no answer",
        "no_route": "no route to host",
        "unknown_host": "the name cannot be resolved",
        "no_reply": "it accepts connections but does not answer",
    }.get(error, reason or "the connection broke")


def connect_remedy(error: ConnectError, address: str, system: OsInfo, machine: str) -> str:
    """Return what to do so that `machine` ("the machine of node b") can be reached."""
    if local_network_denied(error, address, system):
        return (
            "macOS keeps this program off the local network: System Settings > Privacy & Security > Local Network, "
            "turn on the terminal or the program that started Shoal, then restart Shoal; if it is on already, turn "
            "it off and on again"
        )
    match error:
        case "refused":
            return f"start it there, or run `shoal doctor` on {machine} to see on which address and port it listens"
        case "timeout":
            return (
                f"check the firewall of {machine} and of the network: a dropped packet looks like this; "
                f"is {machine} on, and is this still its address?"
            )
        case "no_route":
            return (
                f"it should be on a network of this machine: is {machine} on, and is this still its address?"
                if _is_local(address, system.interfaces)
                else "no network of this machine has that address: connect both to one network, or set "
                "SHOAL_ADVERTISE there to an address that others can use"
            )
        case "no_reply":
            return f"it hangs or is stopped: see its log on {machine}, and restart it with `shoal restart`"
        case "unknown_host":
            return "correct the name, or give the address instead"
    return f"run `shoal doctor` on {machine} to see what listens there"
