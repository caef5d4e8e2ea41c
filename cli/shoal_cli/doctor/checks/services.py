"""The services of this node: which run, which do not, which exit again and again. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from shoal_cli.doctor.finding import Finding, join_names, or_ok
from shoal_cli.node.children.restart_policy import CLAIMED, ChildStatus, describe_exit, not_ready_reason

CHECK = "services"
MAX_EXITS_IN_A_ROW = 3
"""Each within half a minute of its start: no accident."""
MAX_RESTARTS = 10
"""Since the supervisor's own start, whatever was between them."""

SupervisorState = Literal["running", "unresponsive", "foreign", "none"]
"""unresponsive: it holds the home's lock and does not answer. foreign: it is another user's."""


class SystemdUnit(msgspec.Struct, frozen=True, kw_only=True):
    """A service as systemd sees it."""

    name: str
    """`storage`, `nats`"""
    active: str
    """active, activating, failed, inactive"""
    result: str = ""
    restart_count: int = 0


class ServiceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of this node's services."""

    home: str
    node: str
    """ "" while the home has no node.toml."""
    supervisor: SupervisorState = "none"
    pid: int = 0
    children: Sequence[ChildStatus] = ()
    log_tails: Mapping[str, str] = {}
    """The last line of the log of each child that has exited."""
    units: Sequence[SystemdUnit] = ()
    live: Sequence[str] | None = None
    """Services of this node that the cluster sees; None where NATS could not be asked."""


def check(facts: ServiceFacts) -> list[Finding]:
    """Return what is wrong with them."""
    match facts.supervisor:
        case "unresponsive":
            return [
                Finding(
                    CHECK,
                    "problem",
                    f"the supervisor in {facts.home} (pid {facts.pid or 'unknown'}) is running but does not answer",
                    "`shoal down`, then `shoal up`; see `shoal logs supervisor`",
                )
            ]
        case "foreign":
            return [
                Finding(CHECK, "skipped", f"the supervisor in {facts.home} is another user's and cannot be asked")
            ]
        case "running":
            return _supervised(facts)
    if facts.units:
        return _units(facts)
    if facts.live:
        return [
            Finding(CHECK, "ok", f"the cluster sees {join_names(list(facts.live), 6)}; not started by `shoal up`")
        ]
    if not facts.node:
        return [Finding(CHECK, "warning", f"no node was ever started in {facts.home}", "start one with `shoal up`")]
    return [
        Finding(
            CHECK,
            "problem",
            f"node {facts.node} is not running in {facts.home}",
            "start it with `shoal up`",
            facts.node,
        )
    ]


def _supervised(facts: ServiceFacts) -> list[Finding]:
    wrong = [f for c in facts.children if (f := _child(c, facts.log_tails.get(c.name, ""))) is not None]
    if facts.live is not None:
        unseen = [c.name for c in facts.children if c.phase == "ready" and c.name not in ("nats", *facts.live)]
        wrong += [
            Finding(
                CHECK,
                "problem",
                f"{name} is running, but the cluster does not see it",
                f"it has lost NATS: see `shoal logs {name}`; if it does not come back, `shoal restart {name}`",
                name,
            )
            for name in unseen
        ]
    return or_ok(
        CHECK, wrong, f"{join_names([c.name for c in facts.children], 7)} are running, supervised by pid {facts.pid}"
    )


def _child(child: ChildStatus, log_tail: str) -> Finding | None:
    logs = f"see `shoal logs {child.name}`" + (f"; its last line: {log_tail}" if log_tail else "")
    if child.problem:
        return Finding(CHECK, "problem", child.problem, logs, child.name)
    if child.phase == "ready":
        if child.last_exit_code is None or (
            child.exits_in_a_row < MAX_EXITS_IN_A_ROW and child.restart_count < MAX_RESTARTS
        ):
            return None
        if child.exits_in_a_row < MAX_EXITS_IN_A_ROW:
            what = (
                f"{child.name} is running, but was restarted {child.restart_count} times (`shoal restart` included; "
                f"last exit of its own: {describe_exit(child.last_exit_code)})"
            )
            return Finding(CHECK, "warning", what, logs, child.name)
        what = (
            f"{child.name} is running, but exited {child.exits_in_a_row} times in a row before, each soon after its "
            f"start (last: {describe_exit(child.last_exit_code)})"
        )
        return Finding(CHECK, "warning", what, logs, child.name)
    if child.last_exit_code == CLAIMED:
        return Finding(
            CHECK,
            "problem",
            f"{child.name} is not running: {describe_exit(child.last_exit_code)}",
            f"stop the other one: systemd or launchd, a second `shoal up`, a machine with the same node id; {logs}",
            child.name,
        )
    if child.last_exit_code is None:
        return Finding(
            CHECK,
            "warning",
            f"{child.name}: {not_ready_reason(child)}",
            f"wait a moment; if that does not change, {logs}",
        )
    return Finding(CHECK, "problem", f"{child.name} is not running: {not_ready_reason(child)}", logs, child.name)


def _units(facts: ServiceFacts) -> list[Finding]:
    wrong = []
    for unit in facts.units:
        journal = f"`journalctl --user -u shoal-{unit.name}` says why"
        if unit.active == "failed" or (unit.active == "activating" and unit.restart_count):
            how = f"result {unit.result or 'unknown'}, {unit.restart_count} restarts"
            what = f"shoal-{unit.name} is {unit.active} ({how})"
            wrong.append(Finding(CHECK, "problem", what, journal, unit.name))
        elif unit.active == "activating":
            wrong.append(Finding(CHECK, "warning", f"shoal-{unit.name} is starting, not ready yet", journal))
        elif unit.active == "inactive" and unit.name != "nats":
            remedy = f"`systemctl --user enable --now shoal-{unit.name}`"
            wrong.append(Finding(CHECK, "problem", f"shoal-{unit.name} is not running", remedy, unit.name))
        elif unit.restart_count >= MAX_EXITS_IN_A_ROW:
            what = f"shoal-{unit.name} is running, but was restarted {unit.restart_count} times"
            wrong.append(Finding(CHECK, "warning", what, journal, unit.name))
    return or_ok(CHECK, wrong, f"systemd runs {join_names([u.name for u in facts.units if u.active == 'active'], 7)}")
