"""Memory for models, and open files. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, Level, or_ok
from shoal_common.host.own_process import FILE_LIMIT_REMEDY, NEEDED_FILES
from shoal_common.units import format_bytes

MEMORY, LIMITS = "memory", "open files"
MIN_AVAILABLE_SHARE = 0.1
"""With less memory available an instance would push other programs out."""
MIN_FILES = 512
NEARLY_ALL = 0.8


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Memory as inference counts it."""

    total_bytes: int
    available_bytes: int
    cap_bytes: int | None = None
    """`[inference] max_memory_bytes`."""
    settings_errors: Sequence[str] = ()
    """What is wrong with `[inference]` of node.toml or the environment."""
    machine_bytes: int | None = None
    """All of the machine's, of which a container may have `total_bytes`."""


class OpenFiles(msgspec.Struct, frozen=True):
    """A process and its open files."""

    name: str
    limit: int
    """-1: none."""
    count: int = 0


def check_memory(facts: MemoryFacts) -> list[Finding]:
    """Return what is wrong with the memory."""
    wrong = []
    cap, total = facts.cap_bytes, facts.total_bytes
    for error in facts.settings_errors:
        wrong.append(Finding(MEMORY, "problem", error, "correct it, then run `shoal restart inference`"))
    if cap is not None and cap > total:
        what = f"the memory cap of {format_bytes(cap)} has no effect: there are {format_bytes(total)}"
        wrong.append(Finding(MEMORY, "warning", what, "lower [inference] max_memory_bytes in node.toml"))
    if facts.available_bytes < MIN_AVAILABLE_SHARE * total:
        what = f"only {format_bytes(facts.available_bytes)} of {format_bytes(total)} memory are available"
        wrong.append(Finding(MEMORY, "warning", what, "end what uses it; `shoal ps` shows the instances"))
    capped = "" if cap is None else f", at most {format_bytes(cap)} for instances"
    machine = facts.machine_bytes
    limited = f", which a control group allows of {format_bytes(machine)}" if machine and machine > total else ""
    what = f"{format_bytes(facts.available_bytes)} of {format_bytes(total)} available{limited}{capped}"
    return or_ok(MEMORY, wrong, what)


def check_files(processes: Sequence[OpenFiles]) -> list[Finding]:
    """Return which processes may not open as many files as they need."""
    wrong = []
    for process in processes:
        if process.limit < 0:
            continue
        what = f"{process.name} may have {process.limit} files and connections open"
        remedy = FILE_LIMIT_REMEDY
        if process.limit < NEEDED_FILES:
            level: Level = "problem" if process.limit < MIN_FILES else "warning"
            wrong.append(Finding(LIMITS, level, f"{what}, fewer than the {NEEDED_FILES} it may need", remedy))
        elif process.count > NEARLY_ALL * process.limit:
            wrong.append(Finding(LIMITS, "warning", f"{what}, and has {process.count}", remedy))
    lowest = min((p.limit for p in processes if p.limit >= 0), default=-1)
    return or_ok(LIMITS, wrong, "no limit" if lowest < 0 else f"each process may have at least {lowest} open")
