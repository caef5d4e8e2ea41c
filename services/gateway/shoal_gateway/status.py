"""The cluster as people look at it: `GET /v1/status`. Pure."""

from __future__ import annotations

import msgspec

from shoal_common.errors import ErrorBody
from shoal_common.interfaces import Interface
from shoal_common.messages.facts import Live
from shoal_common.messages.records import (
    DownloadState,
    InstancePhase,
    InstanceSpec,
    InstanceState,
    PartState,
    StagePhase,
    StageSpec,
    StageState,
    StorageState,
)
from shoal_common.reach import ways
from shoal_common.subjects import SERVICES
from shoal_gateway.picture import Picture

_MEMORY_TELLERS = ("inference", "storage", *SERVICES)
"""Whose word on a node's memory counts, best first."""


class ServiceView(msgspec.Struct, frozen=True, kw_only=True):
    """A service of a node."""

    version: str
    pid: int
    host: str
    uptime_s: float
    addresses: list[str]


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node. One that is not live is known from what it left in `state`."""

    node: str
    live: bool
    silent_since_s: float | None
    """When a node that is not live was found silent (Unix time); it is retired when that is long ago."""
    drained: bool
    """Whether people want nothing to run on it."""
    services: dict[str, ServiceView]
    missing_services: list[str]
    other_versions: dict[str, str]
    """Services of it that are of another major version than the node that answers, which ignores them."""
    link: str
    """The kind of link by which the node that answers would reach this one's fileserver; "" where it cannot say."""
    memory_total_bytes: int
    memory_available_bytes: int
    storage: StorageState | None


class StorageView(msgspec.Struct, frozen=True, kw_only=True):
    """A node's disk: what its storage has said of it. `live` is whether it could be asked now."""

    node: str
    live: bool
    disk_free_bytes: int | None
    """Free space by the latest beat of a live storage, where `storage` has it as of the last change."""
    storage: StorageState | None
    parts: list[PartState]
    """Models of which it has some layers."""


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """A model and the nodes that hold all of it."""

    model: str
    repo: str
    commit: str
    nodes: list[str]
    size_bytes: int
    adopted_from: dict[str, str]
    """By node, the directory of a read-only root where it is; nodes that have it in their store are not here."""


class DownloadView(msgspec.Struct, frozen=True, kw_only=True):
    """A DownloadState, without the list of its blobs."""

    node: str
    model: str
    phase: str
    commit: str
    total_bytes: int
    done_bytes: int
    resumed_bytes: int
    sources: dict[str, int]
    verified_bytes: int
    speed_bytes_per_s: float
    source_speeds: dict[str, float]
    eta_s: float | None
    switched: dict[str, int]
    waiting_for: str
    error: ErrorBody | None
    started_at_s: float
    updated_at_s: float
    layers: list[list[int]]
    """Of which layers it brings what is needed; empty: all of the model."""


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """A stage: where it is placed, and how it stands there. `phase` is None until its node has spoken."""

    rank: int
    node: str
    first_layer: int | None
    last_layer: int | None
    phase: StagePhase | None
    epoch: int
    address: str
    weight_bytes: int
    error: ErrorBody | None


class InstanceView(msgspec.Struct, frozen=True, kw_only=True):
    """An instance with its stages."""

    id: str
    model: str
    repo: str
    commit: str
    phase: InstancePhase
    nodes: list[str]
    epoch: int
    context_tokens: int
    created_at_s: float
    tier: str
    is_low_memory: bool
    """Whether other programs may have to give memory back."""
    error: ErrorBody | None
    stages: list[StageView]


class StatusView(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at once. `node` is the one that answers."""

    node: str
    version: str
    nats_connected: bool
    nodes: list[NodeView]
    models: list[ModelView]
    parts: list[PartState]
    """Models of which a node has some layers, by model, then node."""
    downloads: list[DownloadView]
    instances: list[InstanceView]


class Place(msgspec.Struct, frozen=True):
    """Where the node that answers is: its network (`identity.this_network`), and its interfaces."""

    network: str
    interfaces: tuple[Interface, ...]


def status_view(
    picture: Picture, node: str, version: str, nats_connected: bool, now_s: float, place: Place
) -> StatusView:
    """The whole status."""
    return StatusView(
        node=node,
        version=version,
        nats_connected=nats_connected,
        nodes=node_views(picture, now_s, place),
        models=model_views(picture),
        parts=parts_of(picture),
        downloads=download_views(picture),
        instances=instance_views(picture),
    )


def known_nodes(picture: Picture) -> list[str]:
    """Every node that is live or that `state` or `spec` names."""
    named = {*picture.live, *picture.storages, *picture.other_versions}
    named |= {d.node for d in picture.downloads} | {m.node for m in picture.models}
    named |= {p.node for p in picture.parts}
    named |= {s.node for spec in picture.specs.values() for s in spec.stages}
    named |= {s.node for stages in picture.stages.values() for s in stages.values()}
    return sorted(named)


def node_views(picture: Picture, now_s: float, place: Place) -> list[NodeView]:
    """All nodes, in order of their names."""
    return [_node_view(picture, node, now_s, place) for node in known_nodes(picture)]


def _node_view(picture: Picture, node: str, now_s: float, place: Place) -> NodeView:
    services = picture.live.get(node, {})
    fileserver = services.get("fileserver")
    reached = ways(fileserver, place.network, place.interfaces) if fileserver else []
    total_bytes, available_bytes = _memory(services)
    return NodeView(
        node=node,
        live=bool(services),
        silent_since_s=picture.silent[node].silent_since_s if not services and node in picture.silent else None,
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
        link=reached[0].kind if reached else "",
        memory_total_bytes=total_bytes,
        memory_available_bytes=available_bytes,
        storage=picture.storages.get(node),
    )


def _memory(services: dict[str, Live]) -> tuple[int, int]:
    for name in _MEMORY_TELLERS:
        live = services.get(name)
        if live is not None and live.facts.memory_total_bytes:
            return live.facts.memory_total_bytes, live.facts.memory_available_bytes
    return 0, 0


def storage_views(picture: Picture) -> list[StorageView]:
    """The disks of all nodes whose storage is live or has said something, in order of their names."""
    nodes = sorted({*picture.storages, *picture.nodes_with("storage")})
    views = []
    for node in nodes:
        live = picture.live.get(node, {}).get("storage")
        views.append(
            StorageView(
                node=node,
                live=live is not None,
                disk_free_bytes=live.facts.disk_free_bytes if live else None,
                storage=picture.storages.get(node),
                parts=[part for part in parts_of(picture) if part.node == node],
            )
        )
    return views


def parts_of(picture: Picture) -> list[PartState]:
    """Models of which a node has some layers, by model, then node."""
    return sorted(picture.parts, key=lambda p: (p.model, p.node))


def model_views(picture: Picture) -> list[ModelView]:
    """All models that some node holds whole."""
    nodes: dict[str, list[str]] = {}
    adopted: dict[str, dict[str, str]] = {}
    for held in picture.models:
        if held.adopted_from:
            adopted.setdefault(held.model, {})[held.node] = held.adopted_from
        nodes.setdefault(held.model, []).append(held.node)
    first = {held.model: held for held in reversed(picture.models)}
    return [
        ModelView(
            model=model,
            repo=first[model].repo,
            commit=first[model].commit,
            nodes=sorted(nodes[model]),
            size_bytes=first[model].size_bytes,
            adopted_from=adopted.get(model, {}),
        )
        for model in sorted(nodes)
    ]


def download_view(state: DownloadState) -> DownloadView:
    """One download."""
    return DownloadView(**{name: getattr(state, name) for name in DownloadView.__struct_fields__})


def download_views(picture: Picture) -> list[DownloadView]:
    """All downloads, by model, then node."""
    return [download_view(d) for d in sorted(picture.downloads, key=lambda d: (d.model, d.node))]


def instance_views(picture: Picture) -> list[InstanceView]:
    """All instances, placed or still there, oldest first."""
    ids = picture.specs.keys() | picture.instances.keys()
    views = [instance_view(picture, i) for i in ids]
    return sorted((v for v in views if v is not None), key=lambda v: (v.created_at_s, v.id))


def instance_view(picture: Picture, instance: str) -> InstanceView | None:
    """One instance, or None when nothing is known of it."""
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
        # What is said of an earlier layout says nothing of this one.
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
