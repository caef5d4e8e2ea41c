"""Which instances have to move, because a node that they run on is gone or is to be empty. Pure.

A node that was gone for less than `replace_after` is waited for: a restart costs less than a move. An instance that
stands well is never moved to stand better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import msgspec

from shoal_common.messages.records import InstanceSpec


class Leaving(msgspec.Struct, frozen=True):
    """An instance that has to leave nodes."""

    spec: InstanceSpec
    gone: list[str]
    """Nodes of it that are away, and have been for long enough."""
    drained: list[str]

    @property
    def why(self) -> str:
        """For people."""
        words = [f"{node} is away" for node in self.gone] + [f"{node} is drained" for node in self.drained]
        return ", ".join(words)


class Moves(msgspec.Struct, frozen=True):
    """What has to be done, and when to look again (seconds; None: when something changes)."""

    leaving: list[Leaving]
    wake_s: float | None


def moves(specs: Iterable[InstanceSpec], gone_s: Mapping[str, float], drained: Set[str], after_s: float) -> Moves:
    """Decide. `gone_s`: for how long each node has been away whose inference is not live."""
    leaving, later_s = [], []
    for spec in specs:
        nodes = sorted({stage.node for stage in spec.stages})
        away = [n for n in nodes if gone_s.get(n, -1.0) >= after_s]
        later_s += [after_s - gone_s[n] for n in nodes if 0 <= gone_s.get(n, -1.0) < after_s]
        # One that is drained and away for a moment still moves at once: nobody wants it back there.
        empty = [n for n in nodes if n in drained and n not in away]
        if away or empty:
            leaving.append(Leaving(spec, away, empty))
    return Moves(leaving, min(later_s, default=None))
