"""What `shoal doctor` prints: what is well first, what is worst last, nearest to where one types next. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from shoal_cli.doctor.examine import ORDER, Report
from shoal_cli.doctor.finding import LEVELS, Finding, Level, worst

_STYLES: dict[Level, str] = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}
_LEVEL_WIDTH = max(map(len, LEVELS)) + 2
_CHECK_WIDTH = max(map(len, ORDER)) + 2


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """By level, from good to bad; within a level as the checks come."""

    def key(finding: Finding) -> tuple[int, int]:
        at = ORDER.index(finding.check) if finding.check in ORDER else -1
        return LEVELS.index(finding.level), at

    return sorted(findings, key=key)


def summary(findings: Sequence[Finding]) -> str:
    """How many of what: `2 problems, 1 warning`; `all is well`."""
    counts = {level: sum(f.level == level for f in findings) for level in LEVELS}
    words = [_count(counts[level], level) for level in ("problem", "warning") if counts[level]]
    if counts["skipped"]:
        words.append(f"{counts['skipped']} not looked at")
    return ", ".join(words) or "all is well"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def as_json(report: Report, version: str) -> dict[str, Any]:
    """For programs."""
    return {
        "home": report.home,
        "node": report.node,
        "version": version,
        "worst": worst(report.findings),
        "findings": msgspec.to_builtins(in_order(report.findings)),
    }


def show(report: Report, out: Console) -> None:
    """For people. A terminal gets lines of its width, a file one line each."""
    for finding in _together(in_order(report.findings)):
        style = _STYLES[finding.level]
        head = Text.assemble((finding.level.ljust(_LEVEL_WIDTH), style), (finding.check.ljust(_CHECK_WIDTH), "bold"))
        _hanging(out, head, finding.what, "dim" if finding.level == "skipped" else "")
        if finding.remedy:
            _hanging(out, Text(" " * (_LEVEL_WIDTH + _CHECK_WIDTH - 2) + "→ "), finding.remedy, "")
    name = f"node {report.node}" if report.node else "no node yet"
    last = Text.assemble(f"{name}, {report.home}: ", (summary(report.findings), _STYLES[worst(report.findings)]))
    out.print(last, soft_wrap=True)


def _together(findings: Sequence[Finding]) -> list[Finding]:
    """Skipped checks as one line for each reason: one cause shall not look like seven."""
    why = dict.fromkeys(f.what for f in findings if f.level == "skipped")
    told = [
        Finding("-", "skipped", f"{', '.join(f.check for f in findings if f.what == what)}: {what}") for what in why
    ]
    first = [f for f in findings if f.level == "ok"]
    return [*first, *told, *(f for f in findings if f.level not in ("ok", "skipped"))]


def _hanging(out: Console, head: Text, words: str, style: str) -> None:
    """Words beside a head, and below themselves where the terminal is too narrow."""
    room = out.width - len(head) if out.is_terminal else 0
    if room < 20:
        out.print(head + Text(words, style), soft_wrap=True)
        return
    for number, line in enumerate(Text(words, style).wrap(out, room)):
        out.print((head if number == 0 else Text(" " * len(head))) + line, soft_wrap=True)
