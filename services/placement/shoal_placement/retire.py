"""Which nodes are silent, since when, and which have been silent for too long. Pure: docs/cluster.md.

What decides is what stands in the buckets now, never what happened: a leader that comes after another, or after an
outage, comes to the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import msgspec

from shoal_common.messages.records import InstanceSpec, NodeState, StageState


class Named(msgspec.Struct):
    """The keys of `spec` and `state` that name a node, and the instances that have a stage on it."""

    spec: list[str] = []
    state: list[str] = []
    instances: list[str] = []

    @property
    def count(self) -> int:
        """How many keys."""
        return len(self.spec) + len(self.state)


class Actions(msgspec.Struct, frozen=True):
    """What the leader does now."""

    silent: list[NodeState]
    """To write: these are not live any more."""
    clear: list[str]
    """Nodes whose NodeState goes: they are back, or nothing else names them."""
    retire: list[NodeState]
    """Every key that names these goes."""
    wake_s: float | None
    """When to look again if nothing changes, in seconds from now."""


def named_by(
    spec_keys: Iterable[str],
    state_keys: Iterable[str],
    instances: Iterable[InstanceSpec],
    stages: Iterable[tuple[str, StageState]],
) -> dict[str, Named]:
    """The keys that name each node. A node's own NodeState is not among them."""
    found: dict[str, Named] = {}

    def of(node: str) -> Named:
        return found.setdefault(node, Named())

    for key in spec_keys:
        kind, _, rest = key.partition(".")
        if kind in ("download", "node"):
            of(rest.partition(".")[0]).spec.append(key)
    for key in state_keys:
        kind, _, rest = key.partition(".")
        if kind in ("storage", "download", "model", "part", "links"):
            of(rest.partition(".")[0]).state.append(key)
    for key, stage in stages:
        of(stage.node).state.append(key)
    for instance in instances:
        for node in {stage.node for stage in instance.stages}:
            of(node).instances.append(instance.id)
    return found


def reconcile(
    named: Set[str], live: Set[str], told: Mapping[str, NodeState], now_s: float, retire_after_s: float
) -> Actions:
    """What to do about nodes that are named somewhere, of which these are live and these were said to be silent."""
    silent = [NodeState(node=node, silent_since_s=now_s) for node in sorted(named - live - told.keys())]
    due_s = {n: 0.0 if s.forgotten else s.silent_since_s + retire_after_s - now_s for n, s in told.items()}
    # One that was named by nothing else in the middle of its retirement is retired to the end.
    clear = sorted(n for n in told if n in live or (n not in named and due_s[n] > 0))
    waiting = {n: due_s[n] for n in told if n not in clear}
    later_s = [s for s in waiting.values() if s > 0] + [retire_after_s] * bool(silent)
    return Actions(
        silent=silent,
        clear=clear,
        retire=[told[n] for n, s in sorted(waiting.items()) if s <= 0],
        wake_s=min(later_s, default=None),
    )
