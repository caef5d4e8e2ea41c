"""Replanning an instance: where it has to move, and where it would run better. Pure.

An instance that runs well is never moved to run better: a move is proposed, with its gain and the bytes to download,
and a person decides (docs/placement.md).
"""

from __future__ import annotations

from msgspec import structs

from shoal_common.errors import ShoalError
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.placement import PlaceCommand, RebalanceProposal, Rebalances
from shoal_placement.planning.cluster_facts import ClusterFacts
from shoal_placement.planning.memory_model import stage_key
from shoal_placement.planning.plan import TIERS, layout_name, to_instance_spec
from shoal_placement.planning.planner import plan_layout
from shoal_placement.planning.previews import to_preview
from shoal_placement.planning.requests import requests_in_flight

_MIN_GAIN = 1.1
"""A proposed layout is at least this many times as good: measurements vary by less, and a move is not free."""


def replan(spec: InstanceSpec, cluster: ClusterFacts, layout: str = "") -> InstanceSpec:
    """Return the best spec for an instance now, under its original constraints, or the one with the named layout.

    Raises what `plan` raises.
    """
    chosen = plan_layout(_request(spec, cluster, layout), _without_own_stages(spec, cluster))
    replanned = to_instance_spec(chosen, spec.id, spec.created_at_s)
    return structs.replace(replanned, epoch=spec.epoch + 1, constraints=spec.constraints)


def rebalances(cluster: ClusterFacts) -> Rebalances:
    """Return which instances would run better on another layout, the largest gain first."""
    proposals = [proposal for spec in cluster.instances if (proposal := best_rebalance(spec, cluster)) is not None]
    return Rebalances(rebalances=sorted(proposals, key=lambda r: (-r.gain, r.instance)))


def best_rebalance(spec: InstanceSpec, cluster: ClusterFacts) -> RebalanceProposal | None:
    """Return a better layout for an instance; None if its layout is about as good as any, or it has to move."""
    freed, request = _without_own_stages(spec, cluster), _request(spec, cluster)
    current_layout = structs.replace(request, layout=layout_name(spec.stages), force=True)
    try:
        now, best = plan_layout(current_layout, freed), plan_layout(request, freed)
    except ShoalError:
        return None  # it has to move, or cannot: the mover reports that
    if best.name == now.name:
        return None
    gain = now.layout.cost_s / best.layout.cost_s if best.layout.cost_s > 0 else 1.0
    lower_tier = TIERS.index(best.tier) < TIERS.index(now.tier)
    if gain < _MIN_GAIN and not lower_tier:
        return None
    requests = requests_in_flight(request)
    previews = [to_preview(p, freed.inference_facts, requests or len(p.layout.slices)) for p in (now, best)]
    return RebalanceProposal(
        instance=spec.id, model=spec.model, current=previews[0], proposed=previews[1], gain=round(gain, 3)
    )


def _request(spec: InstanceSpec, cluster: ClusterFacts, layout: str = "") -> PlaceCommand:
    """Return the request the instance was placed by, without the nodes that are not available now."""
    constraints = structs.asdict(spec.constraints)
    available = cluster.inference_facts.keys() - cluster.drained_nodes
    # If none of the named nodes is available, all are kept: the request is refused like any other.
    constraints["nodes"] = [n for n in spec.constraints.nodes if n in available] or spec.constraints.nodes
    constraints["layers"] = {n: count for n, count in spec.constraints.layers.items() if n in available}
    return PlaceCommand(model=spec.model, context_tokens=spec.context_tokens, layout=layout, **constraints)


def _without_own_stages(spec: InstanceSpec, cluster: ClusterFacts) -> ClusterFacts:
    """Return the cluster without the instance: the memory of its stages is free."""
    keys = {stage_key(spec.id, s.rank) for s in spec.stages}
    facts = {n: _without_stages(f, keys) for n, f in cluster.inference_facts.items()}
    return structs.replace(
        cluster, inference_facts=facts, instances=[s for s in cluster.instances if s.id != spec.id]
    )


def _without_stages(facts: NodeFacts, keys: set[str]) -> NodeFacts:
    freed = sum(size for key, size in facts.stages.items() if key in keys)
    if not freed:
        return facts
    return structs.replace(
        facts,
        memory_available_bytes=facts.memory_available_bytes + freed,
        stages={key: size for key, size in facts.stages.items() if key not in keys},
    )
