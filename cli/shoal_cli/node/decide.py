"""The supervisor's decisions: when to start a child again, and when the node is up. Pure; time arrives as `now_s`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Literal

import msgspec

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 10.0
SETTLED_AFTER_S = 30.0
"""A child that lived this long has proved itself: its next end counts as the first."""
CLAIMED = 9
"""The exit code of a service whose place another process holds (errors.Claimed)."""
OTHER_VERSION = 10
"""The exit code of a service that the cluster refuses for its major version (errors.OtherVersion)."""
_REFUSED = (CLAIMED, OTHER_VERSION)
"""Starting again changes nothing: somebody has to go first."""
NEVER_UP_AFTER = 4
"""Ends in a row, never once ready, after which waiting for a child is pointless."""

Phase = Literal["starting", "ready", "waiting", "stopped"]


class History(msgspec.Struct, frozen=True):
    """What is known of a child when it ends: when it began, and how often its predecessors ended too soon."""

    began_s: float
    ends_in_a_row: int = 0


class Restart(msgspec.Struct, frozen=True):
    """Start it again after `delay_s`."""

    delay_s: float
    ends_in_a_row: int


def on_exit(history: History, now_s: float, code: int) -> Restart:
    """How long to wait before starting a child again: 0.2 s doubling to 10 s, from the start after 30 s of life.

    A place that others hold is looked at at the longest interval: it is free only when they go.
    """
    settled = now_s - history.began_s >= SETTLED_AFTER_S
    ends = 1 if settled else history.ends_in_a_row + 1
    if code in _REFUSED:
        return Restart(LONGEST_DELAY_S, ends)
    # The exponent is bounded so that a long run of failures cannot overflow a float.
    return Restart(min(FIRST_DELAY_S * 2.0 ** min(ends - 1, 16), LONGEST_DELAY_S), ends)


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code == CLAIMED:
        return "another process already is this node's service (exit code 9, claimed)"
    if code == OTHER_VERSION:
        return "the cluster runs another major version of Shoal (exit code 10, other version)"
    if code < 0:
        known = -code in {int(s) for s in signal.Signals}
        return f"killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"exit code {code}"


class ChildStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A child as the supervisor tells of it."""

    name: str
    phase: Phase
    pid: int = 0
    restart_count: int = 0
    ends_in_a_row: int = 0
    was_ready: bool = False
    last_code: int | None = None


Verdict = Literal["ready", "waiting", "hopeless"]


def readiness(children: Sequence[ChildStatus]) -> Verdict:
    """Whether the node is up, may yet come up, or has a child that does not start."""
    if all(c.phase == "ready" for c in children):
        return "ready"
    return "hopeless" if any(_hopeless(c) for c in children) else "waiting"


def _hopeless(child: ChildStatus) -> bool:
    if child.phase == "ready" or child.was_ready:
        return False
    return child.last_code in _REFUSED or child.ends_in_a_row >= NEVER_UP_AFTER


def why_not_up(child: ChildStatus) -> str:
    """What keeps a child from being ready, in words."""
    if child.last_code is None:
        return "has started and is not ready yet"
    return f"{how_it_ended(child.last_code)}, {child.ends_in_a_row} in a row"
