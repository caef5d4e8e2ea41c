"""Build the views of `GET /v1/status` from a cluster snapshot. Pure."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from shoal_common.host.addresses import reachable_addresses
from shoal_common.host.interfaces import Interface
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.instances import (
    InstanceSpec,
    InstanceState,
    StageSpec,
    StageState,
)
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.storage import ShardState
from shoal_common.messages.views import (
    DownloadView,
    InstanceView,
    ModelView,
    NodeView,
    ServiceView,
    StageView,
    StatusView,
    StorageView,
)
from shoal_common.names import SERVICES, ModelId, model_id
from shoal_gateway.cluster.snapshot import ClusterSnapshot

_MEMORY_SOURCES = ("inference", "storage", *SERVICES)
"""Services whose memory figures are used, best first."""


class LocalNetwork(msgspec.Struct, frozen=True):
    """The answering node's network (`process_identity.this_network`) and interfaces."""

    network: str
    interfaces: tuple[Interface, ...]


def status_view(
    snapshot: ClusterSnapshot, node: str, version: str, nats_connected: bool, now_s: float, place: LocalNetwork
) -> StatusView:
    """Return the whole status."""
    return StatusView(
        node=node,
        version=version,
        nats_connected=nats_connected,
        nodes=node_views(snapshot, now_s, place),
        models=model_views(snapshot),
        shards=shards_of(snapshot),
        downloads=download_views(snapshot),
        instances=instance_views(snapshot),
    )


def known_nodes(snapshot: ClusterSnapshot) -> list[str]:
    """Return every node that is live or that `state` or `spec` names, sorted."""
    names = {*snapshot.live, *snapshot.storages, *snapshot.other_versions, *snapshot.down_since_s}
    names |= {d.node for d in snapshot.downloads} | {m.node for m in snapshot.models}
    names |= {p.node for p in snapshot.shards}
    names |= {s.node for spec in snapshot.specs.values() for s in spec.stages}
    names |= {s.node for stages in snapshot.stages.values() for s in stages.values()}
    return sorted(names)


def node_views(snapshot: ClusterSnapshot, now_s: float, place: LocalNetwork) -> list[NodeView]:
    """Return all nodes, sorted by name."""
    return [_node_view(snapshot, node, now_s, place) for node in known_nodes(snapshot)]


def _node_view(snapshot: ClusterSnapshot, node: str, now_s: float, place: LocalNetwork) -> NodeView:
    services = snapshot.live.get(node, {})
    fileserver = services.get("fileserver")
    addresses = reachable_addresses(fileserver, place.network, place.interfaces) if fileserver else []
    total_bytes, available_bytes = _memory(services)
    return NodeView(
        node=node,
        live=bool(services),
        down_since_s=snapshot.down_since_s.get(node),
        drained=node in snapshot.drained,
        services={
            name: ServiceView(
                version=live.version,
                pid=live.holder.pid,
                host=live.holder.host.split("/")[0],
                uptime_s=round(max(0.0, now_s - live.started_at_s), 1),
                addresses=live.facts.addresses,
                tls=any(link.tls for link in live.facts.links),
            )
            for name, live in sorted(services.items())
        },
        missing_services=[name for name in SERVICES if name not in services],
        other_versions=snapshot.other_versions.get(node, {}),
        link=addresses[0].kind if addresses else "",
        memory_total_bytes=total_bytes,
        memory_available_bytes=available_bytes,
        storage=snapshot.storages.get(node),
    )


def _memory(services: dict[str, LivenessRecord]) -> tuple[int, int]:
    for name in _MEMORY_SOURCES:
        live = services.get(name)
        if live is not None and live.facts.memory_total_bytes:
            return live.facts.memory_total_bytes, live.facts.memory_available_bytes
    return 0, 0


def storage_views(snapshot: ClusterSnapshot) -> list[StorageView]:
    """Return the disks of all nodes whose storage is live or has published a state, sorted by name."""
    nodes = sorted({*snapshot.storages, *snapshot.live_nodes("storage")})
    views = []
    for node in nodes:
        live = snapshot.live.get(node, {}).get("storage")
        views.append(
            StorageView(
                node=node,
                live=live is not None,
                disk_free_bytes=live.facts.disk_free_bytes if live else None,
                storage=snapshot.storages.get(node),
                shards=[shard for shard in shards_of(snapshot) if shard.node == node],
            )
        )
    return views


def shards_of(snapshot: ClusterSnapshot) -> list[ShardState]:
    """Return the shards, by model, then node."""
    return sorted(snapshot.shards, key=lambda p: (p.model, p.node))


def model_views(snapshot: ClusterSnapshot) -> list[ModelView]:
    """Return all models that some node holds completely."""
    nodes: dict[ModelId, list[str]] = {}
    library_directories: dict[ModelId, dict[str, str]] = {}
    for copy in snapshot.models:
        if copy.library_directory:
            library_directories.setdefault(copy.model, {})[copy.node] = copy.library_directory
        nodes.setdefault(copy.model, []).append(copy.node)
    first = {held.model: held for held in reversed(snapshot.models)}
    return [
        ModelView(
            model=model,
            repo=first[model].repo,
            commit=first[model].commit,
            nodes=sorted(nodes[model]),
            size_bytes=first[model].size_bytes,
            library_directory=library_directories.get(model, {}),
        )
        for model in sorted(nodes)
    ]


def download_view(state: DownloadState) -> DownloadView:
    """Return the view of a download."""
    return DownloadView(**{name: getattr(state, name) for name in DownloadView.__struct_fields__})


def download_views(snapshot: ClusterSnapshot) -> list[DownloadView]:
    """Return all downloads, by model, then node."""
    return [download_view(d) for d in sorted(snapshot.downloads, key=lambda d: (d.model, d.node))]


def instance_views(snapshot: ClusterSnapshot) -> list[InstanceView]:
    """Return all instances, placed or still published, oldest first."""
    ids = snapshot.specs.keys() | snapshot.instances.keys()
    views = [instance_view(snapshot, i) for i in ids]
    return sorted((v for v in views if v is not None), key=lambda v: (v.created_at_s, v.id))


def instance_view(snapshot: ClusterSnapshot, instance: str) -> InstanceView | None:
    """Return the view of an instance, or None for an unknown one."""
    spec, state = snapshot.specs.get(instance), snapshot.instances.get(instance)
    known: InstanceSpec | InstanceState | None = spec or state
    if known is None:
        return None
    planned = {s.rank: s for s in spec.stages} if spec else {}
    actual = snapshot.stages.get(instance, {})
    # The state of an earlier layout does not apply to this one.
    phase = state.phase if state and state.epoch >= known.epoch else "starting"
    live = snapshot.live_nodes("inference")
    # Right after an outage of NATS a missing key proves nothing: the leader decides.
    down = {
        s.node
        for s in planned.values()
        if s.node in snapshot.down_since_s or (phase != "ready" and s.node not in live)
    }
    return InstanceView(
        id=instance,
        model=model_id(known.repo, known.commit),
        repo=known.repo,
        commit=known.commit,
        phase="degraded" if down and phase == "ready" else phase,
        nodes=[s.node for s in spec.stages] if spec else (state.nodes if state else []),
        epoch=known.epoch,
        context_tokens=spec.context_tokens if spec else 0,
        created_at_s=spec.created_at_s if spec else 0.0,
        tier=spec.tier if spec else "fits",
        is_low_memory=spec is not None and spec.tier != "fits",
        error=state.error if state else None,
        stages=[
            _stage_view(snapshot, planned.get(rank), actual.get(rank), rank, down)
            for rank in sorted({*planned, *actual})
        ],
    )


def _stage_view(
    snapshot: ClusterSnapshot, plan: StageSpec | None, stage: StageState | None, rank: int, down: Collection[str]
) -> StageView:
    node = plan.node if plan else (stage.node if stage else "")
    phase = stage.phase if stage else None
    return StageView(
        rank=rank,
        node=node,
        first_layer=plan.first_layer if plan else None,
        last_layer=plan.last_layer if plan else None,
        phase="down" if node in down else phase,
        epoch=stage.epoch if stage else 0,
        address=stage.address if stage else "",
        weight_bytes=stage.weight_bytes if stage else 0,
        error=stage.error if stage else None,
        down_since_s=snapshot.down_since_s.get(node),
    )
