"""The services of this node: who runs, who does not, who ends again and again. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from shoal_cli.doctor.finding import Finding, listed, or_ok
from shoal_cli.node.decide import CLAIMED, ChildStatus, how_it_ended, why_not_up

CHECK = "services"
OFTEN = 3
"""So many ends in a row, each within half a minute of its start, are no accident."""
MANY = 10
"""So many starts anew since the supervisor's own, whatever was between them."""

Supervisor = Literal["answers", "silent", "foreign", "none"]
"""silent: it holds the home's lock and does not answer. foreign: it is another user's."""


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """A service as systemd knows it."""

    name: str
    """`storage`, `nats`"""
    active: str
    """active, activating, failed, inactive"""
    result: str = ""
    restart_count: int = 0


class ServiceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the services of this node."""

    home: str
    node: str
    """ "" while the home has no node.toml."""
    supervisor: Supervisor = "none"
    pid: int = 0
    children: Sequence[ChildStatus] = ()
    last_words: Mapping[str, str] = {}
    """The last line of the log of each child that is not well."""
    units: Sequence[Unit] = ()
    live: Sequence[str] | None = None
    """Services of this node that the cluster sees; None while nobody can say."""


def judge(facts: ServiceFacts) -> list[Finding]:
    """What is wrong with them."""
    match facts.supervisor:
        case "silent":
            return [
                Finding(
                    CHECK,
                    "problem",
                    f"the supervisor in {facts.home} (pid {facts.pid or 'unknown'}) runs and does not answer",
                    "`shoal down`, then `shoal up`; its last words are in `shoal logs supervisor`",
                )
            ]
        case "foreign":
            return [
                Finding(CHECK, "skipped", f"the supervisor in {facts.home} is another user's and cannot be asked")
            ]
        case "answers":
            return _supervised(facts)
    if facts.units:
        return _units(facts)
    if facts.live:
        return [Finding(CHECK, "ok", f"the cluster sees {listed(list(facts.live), 6)}; no supervisor of `shoal up`")]
    if not facts.node:
        return [Finding(CHECK, "warning", f"no node was ever started in {facts.home}", "start one with `shoal up`")]
    return [
        Finding(
            CHECK,
            "problem",
            f"node {facts.node} does not run in {facts.home}",
            "start it with `shoal up`",
            facts.node,
        )
    ]


def _supervised(facts: ServiceFacts) -> list[Finding]:
    wrong = [f for c in facts.children if (f := _child(c, facts.last_words.get(c.name, ""))) is not None]
    if facts.live is not None:
        unseen = [c.name for c in facts.children if c.phase == "ready" and c.name not in ("nats", *facts.live)]
        wrong += [
            Finding(
                CHECK,
                "problem",
                f"{name} runs, and the cluster does not see it in `live`",
                f"it has lost NATS: `shoal logs {name}`, and if it does not come back `shoal restart {name}`",
                name,
            )
            for name in unseen
        ]
    return or_ok(CHECK, wrong, f"{listed([c.name for c in facts.children], 7)} run, supervised by pid {facts.pid}")


def _child(child: ChildStatus, last_words: str) -> Finding | None:
    logs = f"see `shoal logs {child.name}`" + (f", which ends with: {last_words}" if last_words else "")
    if child.phase == "ready":
        if child.last_code is None or (child.ends_in_a_row < OFTEN and child.restart_count < MANY):
            return None
        if child.ends_in_a_row < OFTEN:
            what = (
                f"{child.name} runs, and was started anew {child.restart_count} times (`shoal restart` counts too; "
                f"last end of its own: {how_it_ended(child.last_code)})"
            )
            return Finding(CHECK, "warning", what, logs, child.name)
        what = (
            f"{child.name} runs, and ended {child.ends_in_a_row} times in a row before, each soon after its start "
            f"(last: {how_it_ended(child.last_code)})"
        )
        return Finding(CHECK, "warning", what, logs, child.name)
    if child.last_code == CLAIMED:
        return Finding(
            CHECK,
            "problem",
            f"{child.name} does not run: {how_it_ended(child.last_code)}",
            f"stop the other one: systemd or launchd, a second `shoal up`, a machine with the same node id; {logs}",
            child.name,
        )
    if child.last_code is None:
        return Finding(CHECK, "warning", f"{child.name} {why_not_up(child)}", f"wait a moment; if it stays so {logs}")
    return Finding(CHECK, "problem", f"{child.name} does not run: {why_not_up(child)}", logs, child.name)


def _units(facts: ServiceFacts) -> list[Finding]:
    wrong = []
    for unit in facts.units:
        journal = f"`journalctl --user -u shoal-{unit.name}` says why"
        if unit.active == "failed" or (unit.active == "activating" and unit.restart_count):
            how = f"result {unit.result or 'unknown'}, {unit.restart_count} restarts"
            what = f"shoal-{unit.name} is {unit.active} ({how})"
            wrong.append(Finding(CHECK, "problem", what, journal, unit.name))
        elif unit.active == "activating":
            wrong.append(Finding(CHECK, "warning", f"shoal-{unit.name} is starting, and not ready yet", journal))
        elif unit.active == "inactive" and unit.name != "nats":
            remedy = f"`systemctl --user enable --now shoal-{unit.name}`"
            wrong.append(Finding(CHECK, "problem", f"shoal-{unit.name} does not run", remedy, unit.name))
        elif unit.restart_count >= OFTEN:
            what = f"shoal-{unit.name} runs, and was restarted {unit.restart_count} times"
            wrong.append(Finding(CHECK, "warning", what, journal, unit.name))
    return or_ok(CHECK, wrong, f"systemd runs {listed([u.name for u in facts.units if u.active == 'active'], 7)}")
