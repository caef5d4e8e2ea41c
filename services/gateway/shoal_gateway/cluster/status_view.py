"""Build the views of `GET /v1/status` from a cluster snapshot. Pure."""

from __future__ import annotations

import msgspec

from shoal_common.bus.subjects import SERVICES
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
from shoal_gateway.cluster.snapshot import ClusterSnapshot

_MEMORY_SOURCES = ("inference", "storage", *SERVICES)
"""Services whose memory figures are used, best first."""


class LocalNetwork(msgspec.Struct, frozen=True):
    """The answering node's network (`process_identity.this_network`) and interfaces."""

    network: str
    interfaces: tuple[Interface, ...]


def status_view(
    picture: ClusterSnapshot, node: str, version: str, nats_connected: bool, now_s: float, place: LocalNetwork
) -> StatusView:
    """Return the whole status."""
    return StatusView(
        node=node,
        version=version,
        nats_connected=nats_connected,
        nodes=node_views(picture, now_s, place),
        models=model_views(picture),
        shards=shards_of(picture),
        downloads=download_views(picture),
        instances=instance_views(picture),
    )


def known_nodes(picture: ClusterSnapshot) -> list[str]:
    """Return every node that is live or that `state` or `spec` names, sorted."""
    names = {*picture.live, *picture.storages, *picture.other_versions}
    names |= {d.node for d in picture.downloads} | {m.node for m in picture.models}
    names |= {p.node for p in picture.shards}
    names |= {s.node for spec in picture.specs.values() for s in spec.stages}
    names |= {s.node for stages in picture.stages.values() for s in stages.values()}
    return sorted(names)


def node_views(picture: ClusterSnapshot, now_s: float, place: LocalNetwork) -> list[NodeView]:
    """Return all nodes, sorted by name."""
    return [_node_view(picture, node, now_s, place) for node in known_nodes(picture)]


def _node_view(picture: ClusterSnapshot, node: str, now_s: float, place: LocalNetwork) -> NodeView:
    services = picture.live.get(node, {})
    fileserver = services.get("fileserver")
    addresses = reachable_addresses(fileserver, place.network, place.interfaces) if fileserver else []
    total_bytes, available_bytes = _memory(services)
    return NodeView(
        node=node,
        live=bool(services),
        down_since_s=picture.down_nodes[node].down_since_s if not services and node in picture.down_nodes else None,
        drained=node in picture.drained,
        services={
            name: ServiceView(
                version=live.version,
                pid=live.holder.pid,
                host=live.holder.host.split("/")[0],
                uptime_s=round(max(0.0, now_s - live.started_at_s), 1),
                addresses=live.facts.addresses,
            )
            for name, live in sorted(services.items())
        },
        missing_services=[name for name in SERVICES if name not in services],
        other_versions=picture.other_versions.get(node, {}),
        link=addresses[0].kind if addresses else "",
        memory_total_bytes=total_bytes,
        memory_available_bytes=available_bytes,
        storage=picture.storages.get(node),
    )


def _memory(services: dict[str, LivenessRecord]) -> tuple[int, int]:
    for name in _MEMORY_SOURCES:
        live = services.get(name)
        if live is not None and live.facts.memory_total_bytes:
            return live.facts.memory_total_bytes, live.facts.memory_available_bytes
    return 0, 0


def storage_views(picture: ClusterSnapshot) -> list[StorageView]:
    """Return the disks of all nodes whose storage is live or has published a state, sorted by name."""
    nodes = sorted({*picture.storages, *picture.live_nodes("storage")})
    views = []
    for node in nodes:
        live = picture.live.get(node, {}).get("storage")
        views.append(
            StorageView(
                node=node,
                live=live is not None,
                disk_free_bytes=live.facts.disk_free_bytes if live else None,
                storage=picture.storages.get(node),
                shards=[shard for shard in shards_of(picture) if shard.node == node],
            )
        )
    return views


def shards_of(picture: ClusterSnapshot) -> list[ShardState]:
    """Return the shards, by model, then node."""
    return sorted(picture.shards, key=lambda p: (p.model, p.node))


def model_views(picture: ClusterSnapshot) -> list[ModelView]:
    """Return all models that some node holds completely."""
    nodes: dict[str, list[str]] = {}
    adopted: dict[str, dict[str, str]] = {}
    for held in picture.models:
        if held.library_directory:
            adopted.setdefault(held.model, {})[held.node] = held.library_directory
        nodes.setdefault(held.model, []).append(held.node)
    first = {held.model: held for held in reversed(picture.models)}
    return [
        ModelView(
            model=model,
            repo=first[model].repo,
            commit=first[model].commit,
            nodes=sorted(nodes[model]),
            size_bytes=first[model].size_bytes,
            library_directory=adopted.get(model, {}),
        )
        for model in sorted(nodes)
    ]


def download_view(state: DownloadState) -> DownloadView:
    """Return the view of a download."""
    return DownloadView(**{name: getattr(state, name) for name in DownloadView.__struct_fields__})


def download_views(picture: ClusterSnapshot) -> list[DownloadView]:
    """Return all downloads, by model, then node."""
    return [download_view(d) for d in sorted(picture.downloads, key=lambda d: (d.model, d.node))]


def instance_views(picture: ClusterSnapshot) -> list[InstanceView]:
    """Return all instances, placed or still published, oldest first."""
    ids = picture.specs.keys() | picture.instances.keys()
    views = [instance_view(picture, i) for i in ids]
    return sorted((v for v in views if v is not None), key=lambda v: (v.created_at_s, v.id))


def instance_view(picture: ClusterSnapshot, instance: str) -> InstanceView | None:
    """Return the view of an instance, or None for an unknown one."""
    spec, state = picture.specs.get(instance), picture.instances.get(instance)
    known: InstanceSpec | InstanceState | None = spec or state
    if known is None:
        return None
    planned = {s.rank: s for s in spec.stages} if spec else {}
    actual = picture.stages.get(instance, {})
    return InstanceView(
        id=instance,
        model=f"{known.repo}@{known.commit}",
        repo=known.repo,
        commit=known.commit,
        # The state of an earlier layout does not apply to this one.
        phase=state.phase if state and state.epoch >= known.epoch else "starting",
        nodes=[s.node for s in spec.stages] if spec else (state.nodes if state else []),
        epoch=known.epoch,
        context_tokens=spec.context_tokens if spec else 0,
        created_at_s=spec.created_at_s if spec else 0.0,
        tier=spec.tier if spec else "fits",
        is_low_memory=spec is not None and spec.tier != "fits",
        error=state.error if state else None,
        stages=[_stage_view(planned.get(rank), actual.get(rank), rank) for rank in sorted({*planned, *actual})],
    )


def _stage_view(plan: StageSpec | None, stage: StageState | None, rank: int) -> StageView:
    return StageView(
        rank=rank,
        node=plan.node if plan else (stage.node if stage else ""),
        first_layer=plan.first_layer if plan else None,
        last_layer=plan.last_layer if plan else None,
        phase=stage.phase if stage else None,
        epoch=stage.epoch if stage else 0,
        address=stage.address if stage else "",
        weight_bytes=stage.weight_bytes if stage else 0,
        error=stage.error if stage else None,
    )
