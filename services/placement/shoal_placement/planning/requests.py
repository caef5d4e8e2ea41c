"""A placement request, resolved: model, nodes, context, tiers. Raises what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from msgspec import structs

from shoal_common.errors import BadInput, NotFound, Unsupported
from shoal_common.messages.downloads import DownloadState
from shoal_common.messages.instances import PlacementConstraints
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.model_shape import ModelShape, ModelSize
from shoal_common.messages.placement import PlaceCommand
from shoal_common.messages.storage import ModelState, ShardState
from shoal_common.names import ModelRef, check_node
from shoal_placement.network.model import NetworkModel
from shoal_placement.planning.cluster_facts import ClusterFacts, find_model, resolve_context_tokens
from shoal_placement.planning.memory_model import (
    model_need,
    read_bandwidth_bytes_per_s,
    reserved_bytes,
    unfused_bytes,
)
from shoal_placement.planning.memory_tiers import MemoryTiers, Tier, memory_tiers
from shoal_placement.planning.plan import TIERS, PlacementPlan
from shoal_placement.solver import Layout, ModelNeed, NodeCapacity, Problem, build_problem
from shoal_placement.solver.cost import Floats

MAX_PARALLEL_ANSWERS = 64
DEFAULT_IN_FLIGHT = 4
"""Requests in flight for the objective `throughput`, if the request names no number."""


class ResolvedRequest(msgspec.Struct, frozen=True):
    """A resolved request: what the model needs, and what each node has."""

    request: PlaceCommand
    model: ModelState
    shape: ModelShape
    context_tokens: int
    need: ModelNeed
    facts: Mapping[str, NodeFacts]
    budgets: Mapping[str, MemoryTiers]
    missing_shares: Mapping[str, Sequence[float]]
    """By node, the share of each layer that it would have to download: 0 to 1."""
    network: NetworkModel
    link_s: Floats
    """Between the nodes in the order of their names; empty: unknown."""

    def unfused(self, node: str) -> int:
        """Return the bytes that a stage takes on this node beyond `need`, which assumes fused attention."""
        return unfused_bytes(self.shape, self.context_tokens, self.facts[node])

    def problem(self, tier: Tier, in_flight: int) -> Problem:
        capacities = [
            NodeCapacity(
                node,
                budget.of(tier) - self.unfused(node),
                s_per_byte=1 / read_bandwidth_bytes_per_s(self.facts[node]),
                missing_shares=self.missing_shares[node],
            )
            for node, budget in sorted(self.budgets.items())
        ]
        counts = self.request.min_nodes, self.request.max_nodes
        problem = build_problem(self.need, capacities, *counts, self.link_s, in_flight)
        return structs.replace(
            problem, layer_counts=self.request.layers, max_fetch_bytes=self.request.max_fetch_bytes
        )

    def plan(self, layout: Layout, tier: Tier) -> PlacementPlan:
        constraints = PlacementConstraints(
            **{name: getattr(self.request, name) for name in PlacementConstraints.__struct_fields__}
        )
        return PlacementPlan(
            self.model, self.shape, layout, self.context_tokens, tier, constraints, self.budgets, self.network
        )


def is_held(model: str, cluster: ClusterFacts) -> bool:
    """Return whether a live node has the model."""
    try:
        find_model(model, cluster)
    except NotFound:
        return False
    return True


def with_remote_model(cluster: ClusterFacts, model: str, size: ModelSize) -> ClusterFacts:
    """Return the cluster as if a node that takes no part had the model: all others would have to download it."""
    ref = ModelRef.parse(size.model)
    remote = ModelState(
        node="",
        repo=ref.repo,
        commit=ref.revision,
        size_bytes=size.size_bytes,
        file_count=0,
        revisions=[ModelRef.parse(model).revision],
        shape=size.shape,
    )
    return structs.replace(cluster, models=[*cluster.models, remote], live_nodes={*cluster.live_nodes, ""})


def allowed_tiers(request: PlaceCommand) -> tuple[Tier, ...]:
    """Return the tiers that a request allows."""
    return TIERS[: 3 if request.force else 2 if request.allow_low_memory else 1]


def requests_in_flight(request: PlaceCommand) -> int:
    """Return the requests in flight that the layout is for; 0: as many as it has stages. Raises BadInput."""
    if request.objective == "latency":
        return 1
    if request.objective == "balanced":
        return 0
    return request.in_flight or DEFAULT_IN_FLIGHT


def resolve_request(request: PlaceCommand, cluster: ClusterFacts) -> ResolvedRequest:
    if not 1 <= request.min_nodes <= request.max_nodes:
        raise BadInput(
            f"min_nodes {request.min_nodes} and max_nodes {request.max_nodes}: "
            "min_nodes must be at least 1 and at most max_nodes"
        )
    if not 1 <= request.max_parallel_answers <= MAX_PARALLEL_ANSWERS:
        raise BadInput(f"answers {request.max_parallel_answers}: must be from 1 to {MAX_PARALLEL_ANSWERS}")
    model = find_model(request.model, cluster)
    if model.shape is None:
        raise Unsupported(f"{model.repo} cannot be placed: {model.shape_error or 'its shape is unknown'}")
    shape, context_tokens = model.shape, resolve_context_tokens(request.context_tokens, model.shape)
    named = {*request.nodes, *request.layers, *(node for node, _ in parse_layout_name(request.layout))}
    for node in {*named, *request.excluded_nodes}:
        check_node(node)
    unknown = sorted(named - set(cluster.inference_facts))
    if unknown:
        raise NotFound(f"no inference service is live on {', '.join(unknown)}: see `shoal status`")
    drained = sorted(named & cluster.drained_nodes)
    if drained:
        raise BadInput(f"drained: {', '.join(drained)}; to use it again, run `shoal node drain {drained[0]} --undo`")
    facts = {
        node: f
        for node, f in cluster.inference_facts.items()
        if node not in cluster.drained_nodes
        and node not in request.excluded_nodes
        and (not request.nodes or node in request.nodes)
    }
    reserved = reserved_bytes(cluster.instances, cluster.models, cluster.inference_facts)
    budgets = {node: memory_tiers(f, reserved.get(node, {})) for node, f in facts.items()}
    count = len(shape.layer_bytes)
    holders = {m.node for m in cluster.models if m.model == model.model}
    shards = {p.node: p for p in cluster.shards if p.model == model.model}
    downloaded = _downloaded(model, cluster.downloads)
    lacks = {
        n: [0.0] * count if n in holders else _missing_shares(shards.get(n), downloaded.get(n, 0.0), count)
        for n in facts
    }
    need = model_need(shape, context_tokens, request.max_parallel_answers)
    link_s = cluster.links.link_costs_s(sorted(budgets), shape.hidden_bytes)
    return ResolvedRequest(request, model, shape, context_tokens, need, facts, budgets, lacks, cluster.links, link_s)


def _missing_shares(shard: ShardState | None, downloaded: float, count: int) -> list[float]:
    ranges = shard.layers if shard is not None else []
    return [0.0 if any(first <= layer < end for first, end in ranges) else 1.0 - downloaded for layer in range(count)]


def _downloaded(model: ModelState, downloads: Iterable[DownloadState]) -> dict[str, float]:
    """Return the share of a model that each node has from unfinished downloads, paused ones included."""
    return {
        d.node: min(d.done_bytes / model.size_bytes, 1.0)
        for d in downloads
        if d.commit == model.commit and ModelRef.parse(d.model).repo == model.repo and model.size_bytes > 0
    }


def parse_layout_name(text: str) -> list[tuple[str, int]]:
    """Parse `a:14,b:2` into nodes and their numbers of layers, in order. Raises BadInput."""
    stages = []
    for part in text.split(",") if text else []:
        node, _, count = part.rpartition(":")
        if not node or not (count.isascii() and count.isdecimal() and 0 < int(count[:6]) < 100_000):
            raise BadInput(f"{text[:80]!r} is not a layout: write nodes and numbers of layers, like a:14,b:2")
        stages.append((node, int(count)))
    if len({node for node, _ in stages}) < len(stages):
        raise BadInput(f"layout {text[:80]!r} names a node twice")
    return stages
