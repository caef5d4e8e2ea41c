"""Which nodes are down, since when, and which have been down for too long. Pure: docs/cluster.md.

Only what is in the buckets now decides, never what happened: a leader that follows another, or an outage, comes to
the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import msgspec

from shoal_common.messages.instances import InstanceSpec, StageState
from shoal_common.messages.placement import NodeState


class KeysOfNode(msgspec.Struct):
    """The keys of `spec` and `state` that name a node, and the instances that have a stage on it."""

    spec: list[str] = []
    state: list[str] = []
    instances: list[str] = []

    @property
    def count(self) -> int:
        """The number of keys."""
        return len(self.spec) + len(self.state)


class RetirementActions(msgspec.Struct, frozen=True):
    """What the leader has to do now."""

    publish_down: list[NodeState]
    """To publish: these nodes are no longer live."""
    clear_down: list[str]
    """Nodes whose NodeState is removed: they are live again, or no other key names them."""
    retire: list[NodeState]
    """Every key that names these is removed."""
    wake_s: float | None
    """Seconds until the next check if nothing changes."""


def keys_by_node(
    spec_keys: Iterable[str],
    state_keys: Iterable[str],
    instances: Iterable[InstanceSpec],
    stages: Iterable[tuple[str, StageState]],
) -> dict[str, KeysOfNode]:
    """Return the keys that name each node. A node's own NodeState is not among them."""
    by_node: dict[str, KeysOfNode] = {}

    def keys_of(node: str) -> KeysOfNode:
        return by_node.setdefault(node, KeysOfNode())

    for key in spec_keys:
        kind, _, rest = key.partition(".")
        if kind in ("download", "node"):
            keys_of(rest.partition(".")[0]).spec.append(key)
    for key in state_keys:
        kind, _, rest = key.partition(".")
        if kind in ("storage", "download", "model", "shard", "links"):
            keys_of(rest.partition(".")[0]).state.append(key)
    for key, stage in stages:
        keys_of(stage.node).state.append(key)
    for instance in instances:
        for node in {stage.node for stage in instance.stages}:
            keys_of(node).instances.append(instance.id)
    return by_node


def plan_retirement(
    named: Set[str], live: Set[str], published: Mapping[str, NodeState], now_s: float, retire_after_s: float
) -> RetirementActions:
    """Return what to do about the `named` nodes. `live`: the live ones; `published`: those published as down."""
    silent = [NodeState(node=node, down_since_s=now_s) for node in sorted(named - live - published.keys())]
    due_s = {n: 0.0 if s.forget_requested else s.down_since_s + retire_after_s - now_s for n, s in published.items()}
    # A node whose retirement was interrupted may be named by nothing else any more: its retirement is finished.
    clear = sorted(n for n in published if n in live or (n not in named and due_s[n] > 0))
    waiting = {n: due_s[n] for n in published if n not in clear}
    later_s = [s for s in waiting.values() if s > 0] + [retire_after_s] * bool(silent)
    return RetirementActions(
        publish_down=silent,
        clear_down=clear,
        retire=[published[n] for n, s in sorted(waiting.items()) if s <= 0],
        wake_s=min(later_s, default=None),
    )
