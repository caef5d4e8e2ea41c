"""The result of a check. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Level = Literal["ok", "skipped", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "skipped", "warning", "problem")
"""From good to bad. `skipped`: it could not be checked, for a reason that another finding gives."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is as it should be, or is not."""

    check: str
    level: Level
    what: str
    """What is the case, and what it concerns."""
    remedy: str = ""
    """What to do about it; "" where there is nothing to do."""
    about: str = ""
    """What it concerns, for programs: `node b`, `stream KV_state`, `port 4222`; "" for this node."""


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 when anything is a problem, else 0."""
    return int(any(f.level == "problem" for f in findings))


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level of all; `ok` of none."""
    return max((f.level for f in findings), key=LEVELS.index, default="ok")


def or_ok(check: str, wrong: Sequence[Finding], what: str) -> list[Finding]:
    """Return what is wrong, or one `ok` when nothing is."""
    return list(wrong) or [Finding(check, "ok", what)]


def join_names(names: Sequence[str], max_names: int = 5) -> str:
    """Return `a, b, c and 4 more`."""
    shown = ", ".join(names[:max_names])
    return f"{shown} and {len(names) - max_names} more" if len(names) > max_names else shown
