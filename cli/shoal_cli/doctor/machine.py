"""Memory for models, and open files. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal_cli.doctor.finding import Finding, Level, or_ok
from shoal_cli.sizes import show_bytes

MEMORY, LIMITS = "memory", "open files"
LITTLE_SHARE = 0.1
"""Less than this of the memory available: an instance would push others out."""
LEAST_FILES, ENOUGH_FILES = 512, 1024
"""A fileserver holds 256 connections, and a blob's file for each; the fetcher as many again."""
NEARLY = 0.8


class MemoryFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Memory as inference counts it."""

    total_bytes: int
    available_bytes: int
    cap_bytes: int | None = None
    """`[inference] max_memory_bytes`."""
    cap_error: str = ""
    machine_bytes: int | None = None
    """All of the machine's, of which a container may have `total_bytes`."""


class Opened(msgspec.Struct, frozen=True):
    """A process and its open files."""

    name: str
    limit: int
    """-1: none."""
    count: int = 0


def judge_memory(facts: MemoryFacts) -> list[Finding]:
    """What is wrong with the memory."""
    wrong = []
    cap, total = facts.cap_bytes, facts.total_bytes
    if facts.cap_error:
        remedy = "give bytes, for example max_memory_bytes = 24000000000, then `shoal restart inference`"
        wrong.append(Finding(MEMORY, "problem", facts.cap_error, remedy))
    if cap is not None and cap > total:
        words = f"the memory cap of {show_bytes(cap)} has no effect: there are {show_bytes(total)}"
        wrong.append(Finding(MEMORY, "warning", words, "lower [inference] max_memory_bytes in node.toml"))
    if facts.available_bytes < LITTLE_SHARE * total:
        words = f"{show_bytes(facts.available_bytes)} of {show_bytes(total)} memory are available"
        wrong.append(Finding(MEMORY, "warning", words, "end what uses it; `shoal ps` shows the instances"))
    capped = "" if cap is None else f", at most {show_bytes(cap)} for instances"
    whole = facts.machine_bytes
    limited = (
        f", which is what a control group lets it have of {show_bytes(whole)}" if whole and whole > total else ""
    )
    what = f"{show_bytes(facts.available_bytes)} of {show_bytes(total)} available{limited}{capped}"
    return or_ok(MEMORY, wrong, what)


def judge_files(opened: Sequence[Opened]) -> list[Finding]:
    """Whether processes may open as many files as they need."""
    wrong = []
    for process in opened:
        if process.limit < 0:
            continue
        words = f"{process.name} may have {process.limit} files and connections open"
        remedy = (
            f"`ulimit -n {4 * ENOUGH_FILES}` before `shoal up`; LimitNOFILE= in systemd's units, "
            "`launchctl limit maxfiles` on macOS; then restart the node"
        )
        if process.limit < ENOUGH_FILES:
            level: Level = "problem" if process.limit < LEAST_FILES else "warning"
            wrong.append(Finding(LIMITS, level, f"{words}, fewer than the {ENOUGH_FILES} it may need", remedy))
        elif process.count > NEARLY * process.limit:
            wrong.append(Finding(LIMITS, "warning", f"{words}, and has {process.count}", remedy))
    least = min((p.limit for p in opened if p.limit >= 0), default=-1)
    return or_ok(LIMITS, wrong, "no limit" if least < 0 else f"{least} may be open in each process, or more")
