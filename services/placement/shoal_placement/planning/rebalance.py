"""Replanning an instance: where it has to move, and where it would run better. Pure.

An instance that runs well is never moved to run better: a move is proposed, with its gain and the bytes to download,
and a person decides (docs/placement.md).
"""

from __future__ import annotations

from msgspec import structs

from shoal_common.errors import ShoalError
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.liveness import Facts
from shoal_common.messages.placement import Place, Rebalances, Rebalancing
from shoal_placement.planning.cluster_facts import World
from shoal_placement.planning.memory_model import stage_key
from shoal_placement.planning.plan import TIERS, layout_name, spec_of
from shoal_placement.planning.planner import plan
from shoal_placement.planning.previews import preview_of
from shoal_placement.planning.requests import in_flight

_MIN_GAIN = 1.1
"""A proposed layout is at least this many times as good: measurements vary by less, and a move is not free."""


def placed_anew(spec: InstanceSpec, world: World, layout: str = "") -> InstanceSpec:
    """Return the best spec for an instance now, under its original constraints, or the one with the named layout.

    Raises what `plan` raises.
    """
    chosen = plan(_request(spec, world, layout), _without_own_stages(spec, world))
    replanned = spec_of(chosen, spec.id, spec.created_at_s)
    return structs.replace(replanned, epoch=spec.epoch + 1, asked=spec.asked)


def rebalances(world: World) -> Rebalances:
    """Return which instances would run better on another layout, the largest gain first."""
    proposals = [proposal for spec in world.instances if (proposal := better(spec, world)) is not None]
    return Rebalances(rebalances=sorted(proposals, key=lambda r: (-r.gain, r.instance)))


def better(spec: InstanceSpec, world: World) -> Rebalancing | None:
    """Return a better layout for an instance; None if its layout is about as good as any, or it has to move."""
    freed, request = _without_own_stages(spec, world), _request(spec, world)
    current_layout = structs.replace(request, layout=layout_name(spec.stages), force=True)
    try:
        now, best = plan(current_layout, freed), plan(request, freed)
    except ShoalError:
        return None  # it has to move, or cannot: the mover reports that
    if best.name == now.name:
        return None
    gain = now.layout.cost_s / best.layout.cost_s if best.layout.cost_s > 0 else 1.0
    lower_tier = TIERS.index(best.tier) < TIERS.index(now.tier)
    if gain < _MIN_GAIN and not lower_tier:
        return None
    requests = in_flight(request)
    shown = [preview_of(p, freed.facts, requests or len(p.layout.slices)) for p in (now, best)]
    return Rebalancing(instance=spec.id, model=spec.model, now=shown[0], better=shown[1], gain=round(gain, 3))


def _request(spec: InstanceSpec, world: World, layout: str = "") -> Place:
    """Return the request the instance was placed by, without the nodes that are not available now."""
    asked = structs.asdict(spec.asked)
    available = world.facts.keys() - world.drained
    # If none of the named nodes is available, all are kept: the request is refused like any other.
    asked["nodes"] = [n for n in spec.asked.nodes if n in available] or spec.asked.nodes
    asked["layers"] = {n: count for n, count in spec.asked.layers.items() if n in available}
    return Place(model=spec.model, context_tokens=spec.context_tokens, layout=layout, **asked)


def _without_own_stages(spec: InstanceSpec, world: World) -> World:
    """Return the cluster without the instance: the memory of its stages is free."""
    keys = {stage_key(spec.id, s.rank) for s in spec.stages}
    facts = {n: _without_stages(f, keys) for n, f in world.facts.items()}
    return structs.replace(world, facts=facts, instances=[s for s in world.instances if s.id != spec.id])


def _without_stages(facts: Facts, keys: set[str]) -> Facts:
    freed = sum(size for key, size in facts.stages.items() if key in keys)
    if not freed:
        return facts
    return structs.replace(
        facts,
        memory_available_bytes=facts.memory_available_bytes + freed,
        stages={key: size for key, size in facts.stages.items() if key not in keys},
    )
