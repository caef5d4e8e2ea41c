"""Clocks: how far each node's is from that of NATS. Pure.

What two processes compare is a time of NATS's clock (`shoal_common.clock`), so no node's own clock can keep it from
the others. What a node tells by its own are logs, the ages of its files, and whether a certificate is valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, or_ok
from shoal_cli.sizes import show_seconds

CHECK = "clocks"
NOTICED_S = 5.0
FAR_S = 3600.0
"""From here on what goes by a file's age, and soon the certificates of the hub, go wrong."""

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


def judge(offsets: Sequence[Offset]) -> list[Finding]:
    """What is wrong with them."""
    wrong = [f for o in offsets if (f := _alone(o)) is not None]
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
    then = "its logs and the times of its files are off by that"
    if abs(sure) < FAR_S:
        return Finding(CHECK, "warning", f"{what}: {then}", _SET_IT, about)
    then += ", what it keeps for a while goes too soon or too late, and it may refuse the hub's certificate"
    return Finding(CHECK, "problem", f"{what}: {then}", _SET_IT, about)
