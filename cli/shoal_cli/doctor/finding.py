"""What a check has found. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Level = Literal["ok", "skipped", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "skipped", "warning", "problem")
"""From good to bad. `skipped`: it could not be looked at, for a reason that another finding has."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is as it should be, or is not."""

    check: str
    level: Level
    what: str
    """What is, and what it concerns."""
    remedy: str = ""
    """What to do about it; "" where nothing is to be done."""
    about: str = ""
    """What it concerns, for programs: `node b`, `stream KV_state`, `port 4222`; "" for this node."""


def exit_code(findings: Iterable[Finding]) -> int:
    """1 when anything is a problem, else 0."""
    return int(any(f.level == "problem" for f in findings))


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level of all; `ok` of none."""
    return max((f.level for f in findings), key=LEVELS.index, default="ok")


def or_ok(check: str, wrong: Sequence[Finding], what: str) -> list[Finding]:
    """What is wrong, or one line that says that nothing is."""
    return list(wrong) or [Finding(check, "ok", what)]


def listed(names: Sequence[str], most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
