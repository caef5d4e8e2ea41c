"""Which instances have to move, because one of their nodes is down or drained. Pure.

A node that has been down for less than `replace_after` is waited for: a restart costs less than a move. An instance
that runs well is never moved to run better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import msgspec

from shoal_common.messages.instances import InstanceSpec


class LeavingInstance(msgspec.Struct, frozen=True):
    """An instance that has to leave nodes."""

    spec: InstanceSpec
    down: list[str]
    """Nodes of it that have been down for `replace_after` or longer."""
    drained: list[str]

    @property
    def reason(self) -> str:
        """The reason, for people."""
        reasons = [f"{node} is down" for node in self.down] + [f"{node} is drained" for node in self.drained]
        return ", ".join(reasons)


class MigrationPlan(msgspec.Struct, frozen=True):
    """The instances that have to move, and when to check again (seconds; None: when something changes)."""

    leaving: list[LeavingInstance]
    wake_s: float | None


def plan_migrations(
    specs: Iterable[InstanceSpec], down_s: Mapping[str, float], drained: Set[str], after_s: float
) -> MigrationPlan:
    """Return which instances have to move. `down_s`: how long each node without live inference has been down."""
    leaving, later_s = [], []
    for spec in specs:
        nodes = sorted({stage.node for stage in spec.stages})
        down = [n for n in nodes if down_s.get(n, -1.0) >= after_s]
        later_s += [after_s - down_s[n] for n in nodes if 0 <= down_s.get(n, -1.0) < after_s]
        # A drained node that is briefly down is left at once: nobody wants the instance back there.
        to_empty = [n for n in nodes if n in drained and n not in down]
        if down or to_empty:
            leaving.append(LeavingInstance(spec, down, to_empty))
    return MigrationPlan(leaving, min(later_s, default=None))
