"""Clocks: how far each node's is from that of NATS. Pure.

Times that processes compare are times of NATS's clock (`shoal_common.bus.cluster_clock`), so a node whose own clock
is wrong still takes part. Its logs, the ages of its files, and whether a certificate is valid go by its own clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, or_ok
from shoal_common.units import format_duration

CHECK = "clocks"
WARNING_S = 5.0
PROBLEM_S = 3600.0
"""From here on retention by file age, and soon the certificates of the hub, go wrong."""

_REMEDY = (
    "set its clock from the network: `timedatectl set-ntp true` on Linux, System Settings > General > Date & Time "
    "on macOS"
)


class ClockOffset(msgspec.Struct, frozen=True):
    """A node's clock against that of NATS."""

    node: str
    ahead_s: float
    """Negative: behind."""
    error_s: float = 0.0
    """The largest error of `ahead_s`."""
    at_least: bool = False
    """Whether it is ahead by at least this much: its liveness record says that it started in the future."""


def against_nats(
    node: str, own: ClockOffset, others: Mapping[str, ClockOffset], started_ahead: Mapping[str, float]
) -> list[ClockOffset]:
    """Return every node's clock against that of NATS.

    `own`: this machine's, against NATS's; `others`: other nodes' against this one, from their fileservers;
    `started_ahead`: by how many seconds a node's service started after NATS received its record, which is all that
    is known of a node whose fileserver is unreachable.
    """
    offsets = {node: ClockOffset(node, own.ahead_s, own.error_s)}
    for name, offset in others.items():
        if name != node:
            offsets[name] = ClockOffset(name, offset.ahead_s + own.ahead_s, offset.error_s + own.error_s)
    for name, ahead_s in started_ahead.items():
        if ahead_s > 0 and name not in offsets:
            offsets[name] = ClockOffset(name, ahead_s, 0.0, at_least=True)
    return [offsets[name] for name in sorted(offsets)]


def check(offsets: Sequence[ClockOffset]) -> list[Finding]:
    """Return which clocks are wrong."""
    wrong = [f for o in offsets if (f := _check_one(o)) is not None]
    largest_s = max((abs(o.ahead_s) for o in offsets), default=0.0)
    error_s = max((o.error_s for o in offsets), default=0.0)
    nodes = "1 node" if len(offsets) == 1 else f"{len(offsets)} nodes"
    return or_ok(CHECK, wrong, f"{nodes}, within {max(largest_s + error_s, 0.1):.1f} s of NATS's")


def _certain_s(offset: ClockOffset) -> float:
    """Return how far off it is for certain, with its sign."""
    certain_s = max(abs(offset.ahead_s) - offset.error_s, 0.0)
    return certain_s if offset.ahead_s > 0 else -certain_s


def _check_one(offset: ClockOffset) -> Finding | None:
    certain_s = _certain_s(offset)
    if abs(certain_s) < WARNING_S:
        return None
    least = "at least " if offset.at_least else ""
    direction = "ahead of" if certain_s > 0 else "behind"
    what = f"the clock of node {offset.node} is {least}{format_duration(abs(offset.ahead_s))} {direction} NATS's"
    about = f"node {offset.node}"
    effect = "its logs and file times are off by that"
    if abs(certain_s) < PROBLEM_S:
        return Finding(CHECK, "warning", f"{what}: {effect}", _REMEDY, about)
    effect += ", retained data is deleted too soon or too late, and it may reject the hub's certificate"
    return Finding(CHECK, "problem", f"{what}: {effect}", _REMEDY, about)
