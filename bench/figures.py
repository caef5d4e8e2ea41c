"""The last line that every benchmark prints: its figures and the machine, as JSON.

    {"figures": {"<name>": {"value": 1.07, "unit": "x", "target": "<= 1.10", "holds": true}}, "machine": {…}}

A script exits with 0 if it could measure, whether or not its targets hold: figures are reported, not asserted.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence

import msgspec
import psutil


class Figure(msgspec.Struct, frozen=True, omit_defaults=True):
    """A measured value. `target` is like `<= 1.10`; empty if the value is only reported."""

    value: float
    unit: str
    target: str = ""
    holds: bool | None = None


class Report(msgspec.Struct, frozen=True):
    """A script's last line."""

    figures: dict[str, Figure]
    machine: dict[str, str | int]


def figure(value: float, unit: str, target: str = "") -> Figure:
    """Return a figure, compared with its target (`<= N` or `>= N`)."""
    holds = None
    if target:
        relation, _, bound = target.partition(" ")
        holds = value <= float(bound) if relation == "<=" else value >= float(bound)
    return Figure(round(value, 4), unit, target, holds)


def machine() -> dict[str, str | int]:
    """Return the facts about this machine that matter for comparisons."""
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }


def report(figures: dict[str, Figure]) -> None:
    """Print the last line."""
    print(msgspec.json.encode(Report(figures, machine())).decode())


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the median of each contender over `rounds`, measured in turn so that noise affects all alike."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            samples[name].append(measure())
    return {name: statistics.median(values) for name, values in samples.items()}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the value that `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)]
