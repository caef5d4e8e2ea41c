"""What `shoal doctor` prints: the best finding first, the worst last, nearest to the next prompt. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from shoal_cli.doctor.finding import LEVELS, Finding, Level, worst
from shoal_cli.doctor.run import CHECKS, DoctorReport

_STYLES: dict[Level, str] = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}
_LEVEL_WIDTH = max(map(len, LEVELS)) + 2
_CHECK_WIDTH = max(map(len, CHECKS)) + 2


def sorted_by_level(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings by level, from good to bad; within a level in the order of the checks."""

    def key(finding: Finding) -> tuple[int, int]:
        position = CHECKS.index(finding.check) if finding.check in CHECKS else -1
        return LEVELS.index(finding.level), position

    return sorted(findings, key=key)


def summary(findings: Sequence[Finding]) -> str:
    """Return the counts: `2 problems, 1 warning`, or `no problems`."""
    counts = {level: sum(f.level == level for f in findings) for level in LEVELS}
    parts = [_count(counts[level], level) for level in ("problem", "warning") if counts[level]]
    if counts["skipped"]:
        parts.append(f"{counts['skipped']} not checked")
    return ", ".join(parts) or "no problems"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def to_json(report: DoctorReport, version: str) -> dict[str, Any]:
    """Return the report for programs."""
    return {
        "home": report.home,
        "node": report.node,
        "version": version,
        "worst": worst(report.findings),
        "findings": msgspec.to_builtins(sorted_by_level(report.findings)),
    }


def print_report(report: DoctorReport, out: Console) -> None:
    """Print the report for people: wrapped on a terminal, one line each in a file."""
    for finding in _merge_skipped(sorted_by_level(report.findings)):
        style = _STYLES[finding.level]
        head = Text.assemble((finding.level.ljust(_LEVEL_WIDTH), style), (finding.check.ljust(_CHECK_WIDTH), "bold"))
        _print_wrapped(out, head, finding.what, "dim" if finding.level == "skipped" else "")
        if finding.remedy:
            _print_wrapped(out, Text(" " * (_LEVEL_WIDTH + _CHECK_WIDTH - 2) + "→ "), finding.remedy, "")
    name = f"node {report.node}" if report.node else "no node yet"
    last = Text.assemble(f"{name}, {report.home}: ", (summary(report.findings), _STYLES[worst(report.findings)]))
    out.print(last, soft_wrap=True)


def _merge_skipped(findings: Sequence[Finding]) -> list[Finding]:
    """Return skipped checks as one line per reason: one cause must not look like seven."""
    reasons = dict.fromkeys(f.what for f in findings if f.level == "skipped")
    merged = [
        Finding("-", "skipped", f"{', '.join(f.check for f in findings if f.what == what)}: {what}")
        for what in reasons
    ]
    first = [f for f in findings if f.level == "ok"]
    return [*first, *merged, *(f for f in findings if f.level not in ("ok", "skipped"))]


def _print_wrapped(out: Console, head: Text, text: str, style: str) -> None:
    """Print text beside a head, wrapped under itself where the terminal is too narrow."""
    width = out.width - len(head) if out.is_terminal else 0
    if width < 20:
        out.print(head + Text(text, style), soft_wrap=True)
        return
    for number, line in enumerate(Text(text, style).wrap(out, width)):
        out.print((head if number == 0 else Text(" " * len(head))) + line, soft_wrap=True)
