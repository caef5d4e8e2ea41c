"""When to restart a child, and when the node is ready. Pure; time arrives as `now_s`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Literal

import msgspec

from shoal_common.concurrency.backoff import Backoff
from shoal_common.errors import AlreadyRunning, OtherVersion

RESTART_BACKOFF = Backoff(0.2, 10.0)
STABLE_AFTER_S = 30.0
"""A child that lived this long is stable: its next exit counts as the first."""
CLAIMED = AlreadyRunning.exit_code
"""Another process already is this node's service."""
OTHER_VERSION = OtherVersion.exit_code
"""The cluster runs another major version."""
_REFUSED = (CLAIMED, OTHER_VERSION)
"""A restart alone changes nothing: another process has to stop first."""
MAX_FAILED_STARTS = 4
"""Exits in a row, never once ready, after which the node does not wait for a child."""

Phase = Literal["starting", "ready", "waiting", "stopped"]


class ExitHistory(msgspec.Struct, frozen=True):
    """A child that exited: when it was started, and how many exits too soon came before."""

    started_s: float
    exits_in_a_row: int = 0


class RestartDecision(msgspec.Struct, frozen=True):
    """Start the child again after `delay_s`."""

    delay_s: float
    exits_in_a_row: int


def decide_restart(history: ExitHistory, now_s: float, code: int) -> RestartDecision:
    """Return when to restart a child: after 0.2 s doubled up to 10 s, from the start after 30 s of life.

    A claimed place, or another version, is retried at the longest interval: only others can change it.
    """
    stable = now_s - history.started_s >= STABLE_AFTER_S
    ends = 1 if stable else history.exits_in_a_row + 1
    if code in _REFUSED:
        return RestartDecision(RESTART_BACKOFF.max_s, ends)
    return RestartDecision(RESTART_BACKOFF.delay_s(ends), ends)


def describe_exit(code: int) -> str:
    """Return an exit code as text."""
    if code == CLAIMED:
        return "another process is already this node's service (exit code 9, already running)"
    if code == OTHER_VERSION:
        return "the cluster runs an incompatible version of Shoal (exit code 10, incompatible version)"
    if code < 0:
        known = -code in {int(s) for s in signal.Signals}
        return f"killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"exit code {code}"


class ChildStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A child as the supervisor reports it."""

    name: str
    phase: Phase
    pid: int = 0
    restart_count: int = 0
    exits_in_a_row: int = 0
    was_ready: bool = False
    last_exit_code: int | None = None
    problem: str = ""
    """What keeps it from its work although it runs, in words for people."""


Verdict = Literal["ready", "waiting", "hopeless"]


def readiness(children: Sequence[ChildStatus]) -> Verdict:
    """Return whether the node is ready, may become ready, or has a child that does not start."""
    if all(c.phase == "ready" for c in children):
        return "ready"
    return "hopeless" if any(_hopeless(c) for c in children) else "waiting"


def _hopeless(child: ChildStatus) -> bool:
    if child.phase == "ready" or child.was_ready:
        return False
    return child.last_exit_code in _REFUSED or child.exits_in_a_row >= MAX_FAILED_STARTS


def not_ready_reason(child: ChildStatus) -> str:
    """Return why a child is not ready, or does not do its work."""
    if child.problem:
        return child.problem
    if child.last_exit_code is None:
        return "started, not ready yet"
    return f"{describe_exit(child.last_exit_code)}, {child.exits_in_a_row} in a row"
