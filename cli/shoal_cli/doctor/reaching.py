"""What it means that an address is not reached. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from shoal_common.interfaces import Interface
from shoal_common.reach import host_of, network

Trouble = Literal["", "refused", "silent", "no_route", "no_name", "mute", "broken"]
"""refused: nobody listens there. silent: no answer at all. no_route: the system says there is no way. no_name: the
name means nothing. mute: it takes the connection and says nothing. broken: connected, and then not as
expected."""

MACOS_WITH_LOCAL_NETWORK = 15


class System(msgspec.Struct, frozen=True):
    """What of this machine matters for reaching others."""

    name: str = "linux"
    """As sys.platform has it."""
    major: int = 0
    """macOS: the first number of its version."""
    interfaces: tuple[Interface, ...] = ()


def local_network_denied(trouble: Trouble, address: str, system: System) -> bool:
    """Whether this looks like macOS denying the local network: no route to a host that is on a wire of ours.

    macOS 15 and later fail such connections with EHOSTUNREACH. Where the address is on none of our networks, the
    route may really be missing.
    """
    if system.name != "darwin" or system.major < MACOS_WITH_LOCAL_NETWORK or trouble != "no_route":
        return False
    return _is_near(address, system.interfaces)


def _is_near(address: str, mine: Sequence[Interface]) -> bool:
    ip = host_of(address)
    return ip is not None and any(ip in network(a) for i in mine if i.kind != "loopback" for a in i.addresses)


def in_words(trouble: Trouble, why: str) -> str:
    """How trying ended."""
    return {
        "refused": "nobody listens there",
        "silent": "no answer",
        "no_route": "no route to host",
        "no_name": "the name cannot be resolved",
        "mute": "it takes connections and does not answer",
    }.get(trouble, why or "it broke off")


def remedy(trouble: Trouble, address: str, system: System, there: str) -> str:
    """What to do so that `there` ("the machine of node b") is reached."""
    if local_network_denied(trouble, address, system):
        return (
            "macOS keeps this program from the local network: System Settings > Privacy & Security > Local Network, "
            "turn on the terminal or the program that started Shoal, then restart Shoal; if it is on already, turn "
            "it off and on again"
        )
    match trouble:
        case "refused":
            return f"start it there, or see on {there} with `shoal doctor` on which address and port it listens"
        case "silent":
            return (
                f"look at the firewall of {there} and between: a packet that is dropped looks like this; "
                f"is {there} on, and is this still its address?"
            )
        case "no_route":
            near = _is_near(address, system.interfaces)
            return (
                f"it should be on a network of this machine: is {there} on, and is this still its address?"
                if near
                else "no network of this machine has that address: connect both to one network, or tell the address "
                "that others can use with SHOAL_ADVERTISE there"
            )
        case "mute":
            return f"it hangs, or is stopped: on {there} see its log, and restart it with `shoal restart`"
        case "no_name":
            return "correct the name, or give the address instead"
    return f"see what listens there: `shoal doctor` on {there}"
