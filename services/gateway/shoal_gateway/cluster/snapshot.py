"""A snapshot of what the gateway knows of the cluster, as plain values for the pure modules."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shoal_common.bus.keys import MEMBERS_KEY
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.liveness.compatibility import CompatibleLiveMirror
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.instances import InstanceSpec, InstanceState, StageState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.placement import MembersState, NodeSpec, NodeState
from shoal_common.messages.storage import ModelState, ShardState, StorageState


class ClusterSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster at one moment."""

    live: dict[str, dict[str, LivenessRecord]] = {}
    """By node, then by service; without nodes that do not answer."""
    other_versions: dict[str, dict[str, str]] = {}
    """Services of another major version, which this node ignores: by node, then by service."""
    storages: dict[str, StorageState] = {}
    downloads: list[DownloadState] = []
    models: list[ModelState] = []
    shards: list[ShardState] = []
    specs: dict[str, InstanceSpec] = {}
    instances: dict[str, InstanceState] = {}
    stages: dict[str, dict[int, StageState]] = {}
    """By instance, then by rank."""
    down_since_s: dict[str, float] = {}
    """Nodes that are down, as the leader has published."""
    drained: frozenset[str] = frozenset()
    """Nodes on which nothing may be placed."""

    def is_live(self, node: str, service: str) -> bool:
        """Return whether a service of a node is live."""
        return service in self.live.get(node, {})

    def live_nodes(self, service: str) -> list[str]:
        """Return the nodes where a service is live, sorted."""
        return sorted(node for node, services in self.live.items() if service in services)


def take_snapshot(live: CompatibleLiveMirror, spec: KvMirror, state: KvMirror) -> ClusterSnapshot:
    """Return a snapshot of three mirrors."""
    by_node: dict[str, dict[str, LivenessRecord]] = {}
    for key, value in live.items("", LivenessRecord):
        node, _, service = key.partition(".")
        by_node.setdefault(node, {})[service] = value
    stages: dict[str, dict[int, StageState]] = {}
    for _, stage in state.items("stage.", StageState):
        stages.setdefault(stage.instance, {})[stage.rank] = stage
    others: dict[str, dict[str, str]] = {}
    for key, other in sorted(live.incompatible.items()):
        node, _, service = key.partition(".")
        others.setdefault(node, {})[service] = other.version
    # This node cannot use what an incompatible storage holds.
    incompatible = {node for node, services in others.items() if "storage" in services}
    lost_since_s = nodes_lost(by_node, state)
    found_down_s = {s.node: s.down_since_s for _, s in state.items("node.", NodeState) if s.node not in by_node}
    return ClusterSnapshot(
        live={node: services for node, services in by_node.items() if node not in lost_since_s},
        other_versions=others,
        storages={s.node: s for _, s in state.items("storage.", StorageState)},
        downloads=[d for _, d in state.items("download.", DownloadState)],
        models=[m for _, m in state.items("model.", ModelState) if m.node not in incompatible],
        shards=[p for _, p in state.items("shard.", ShardState) if p.node not in incompatible],
        specs={s.id: s for _, s in spec.items("instance.", InstanceSpec)},
        instances={i.id: i for _, i in state.items("instance.", InstanceState)},
        stages=stages,
        down_since_s={**found_down_s, **lost_since_s},
        drained=frozenset(s.node for _, s in spec.items("node.", NodeSpec)),
    )


def nodes_lost(live: Mapping[str, Mapping[str, LivenessRecord]], state: KvMirror) -> dict[str, float]:
    """Return the nodes that the leader has found lost, with since when.

    `live`: by node, then by service. Keys of a node that does not answer expire later; a service that has started
    since shows that the node is back.
    """
    members = state.get(MEMBERS_KEY, MembersState) or MembersState()
    return {
        node: since_s
        for node, since_s in members.down_since_s.items()
        if all(record.started_at_s <= since_s for record in live.get(node, {}).values())
    }
