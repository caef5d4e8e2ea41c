"""Clocks: how far each node's is from that of NATS, and what breaks at that distance. Pure.

A command's deadline is counted from NATS's time of its arrival to the clock of the node that carries it out: ahead by
a deadline, and it ends with `expired` before it has begun. With a secret, a token for a blob is good for TOKEN_S by
the clock of who asks, and is judged by the clock of the fileserver that is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, or_ok
from shoal_cli.sizes import show_seconds
from shoal_common.credentials import TOKEN_S

CHECK = "clocks"
NOTICED_S = 5.0
SHORTEST_COMMAND_S = 30.0
"""The shortest deadline of a command, storage's `configure`."""

_SET_IT = (
    "set its clock by the network: `timedatectl set-ntp true` on Linux, System Settings > General > Date & Time \
on macOS"
)


class Offset(msgspec.Struct, frozen=True):
    """A node's clock against that of NATS."""

    node: str
    ahead_s: float
    """Negative: behind."""
    within_s: float = 0.0
    """How far the truth may be from that."""
    at_least: bool = False
    """Whether it is ahead by at least so much: its liveness value says that it began in the future."""


def against_nats(
    node: str, ours: Offset, theirs: Mapping[str, Offset], began_ahead: Mapping[str, float]
) -> list[Offset]:
    """Every node's clock against that of NATS.

    `ours`: this machine's, against NATS's; `theirs`: other nodes' against ours, as their fileservers say it;
    `began_ahead`: by how many seconds a node's service says that it began after NATS had received its word, which is
    all that is known of a node whose fileserver is not reached.
    """
    found = {node: Offset(node, ours.ahead_s, ours.within_s)}
    for name, offset in theirs.items():
        if name != node:
            found[name] = Offset(name, offset.ahead_s + ours.ahead_s, offset.within_s + ours.within_s)
    for name, ahead_s in began_ahead.items():
        if ahead_s > 0 and name not in found:
            found[name] = Offset(name, ahead_s, 0.0, at_least=True)
    return [found[name] for name in sorted(found)]


def judge(offsets: Sequence[Offset], secret: bool) -> list[Finding]:
    """What is wrong with them. `secret`: whether the cluster has one, without which nobody shows tokens."""
    wrong = [f for o in offsets if (f := _alone(o)) is not None]
    wrong += _pairs(offsets, secret)
    most = max((abs(o.ahead_s) for o in offsets), default=0.0)
    exactly = max((o.within_s for o in offsets), default=0.0)
    nodes = "1 node" if len(offsets) == 1 else f"{len(offsets)} nodes"
    return or_ok(CHECK, wrong, f"{nodes}, within {max(most + exactly, 0.1):.1f} s of NATS's")


def _surely(offset: Offset) -> float:
    """How far off it is for certain, with its sign."""
    sure = max(abs(offset.ahead_s) - offset.within_s, 0.0)
    return sure if offset.ahead_s > 0 else -sure


def _alone(offset: Offset) -> Finding | None:
    sure = _surely(offset)
    if abs(sure) < NOTICED_S:
        return None
    least = "at least " if offset.at_least else ""
    way = "ahead of" if sure > 0 else "behind"
    what = f"the clock of node {offset.node} is {least}{show_seconds(abs(offset.ahead_s))} {way} NATS's"
    about = f"node {offset.node}"
    if sure >= SHORTEST_COMMAND_S:
        then = f"commands with a shorter deadline (configure: {SHORTEST_COMMAND_S:.0f} s) end with `expired` there"
        return Finding(CHECK, "problem", f"{what}: {then}", _SET_IT, about)
    breaks = (
        f"from {SHORTEST_COMMAND_S:.0f} s on commands end with `expired`"
        if sure > 0
        else f"from {TOKEN_S // 60} min on, nodes with the right time cannot take models from it"
    )
    return Finding(CHECK, "warning", f"{what}: {breaks}", _SET_IT, about)


def _pairs(offsets: Sequence[Offset], secret: bool) -> list[Finding]:
    """Who cannot take models from whom: the furthest pair stands for all of them."""
    if not secret or len(offsets) < 2:
        return []
    first, last = max(offsets, key=lambda o: o.ahead_s), min(offsets, key=lambda o: o.ahead_s)
    apart_s = first.ahead_s - last.ahead_s - first.within_s - last.within_s
    if apart_s <= TOKEN_S:
        return []
    both = apart_s > 2 * TOKEN_S
    what = (
        f"{first.node} and {last.node} are {show_seconds(first.ahead_s - last.ahead_s)} apart: the fileserver of "
        f"{last.node} refuses {first.node}'s tokens (401)" + (", and the other way round too" if both else "")
    )
    why = f"tokens are good for {TOKEN_S // 60} min; {_SET_IT}"
    return [Finding(CHECK, "problem", what, why, f"nodes {first.node}, {last.node}")]
