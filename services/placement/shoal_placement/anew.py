"""An instance laid out anew: where it has to move to, and where it would stand better. Pure.

An instance that stands well is never moved to stand better: that is proposed, with what is gained and what has to be
downloaded for it, and a person decides (docs/placement.md).
"""

from __future__ import annotations

from msgspec import structs

from shoal_common.errors import ShoalError
from shoal_common.messages.commands import Place
from shoal_common.messages.facts import Facts
from shoal_common.messages.questions import Rebalances, Rebalancing
from shoal_common.messages.records import InstanceSpec
from shoal_placement.decide import World
from shoal_placement.need import stage_key
from shoal_placement.planning import TIERS, in_flight, layout_name, plan, preview_of, spec_of

_WORTH = 1.1
"""A layout is proposed that is so many times as good: what is measured wavers by less, and a move is not for free."""


def placed_anew(spec: InstanceSpec, world: World, layout: str = "") -> InstanceSpec:
    """The instance as it could run now, as it was asked for. `layout`: exactly so. Raises what `plan` raises."""
    fresh = spec_of(plan(_request(spec, world, layout), _as_if_stopped(spec, world)), spec.id, spec.created_at_s)
    return structs.replace(fresh, epoch=spec.epoch + 1, asked=spec.asked)


def rebalances(world: World) -> Rebalances:
    """Which instances would stand better elsewhere, what gains most first."""
    found = [proposal for spec in world.instances if (proposal := better(spec, world)) is not None]
    return Rebalances(rebalances=sorted(found, key=lambda r: (-r.gain, r.instance)))


def better(spec: InstanceSpec, world: World) -> Rebalancing | None:
    """What to propose for an instance; None where it stands about as well as it can, or cannot stay."""
    without, request = _as_if_stopped(spec, world), _request(spec, world)
    as_it_is = structs.replace(request, layout=layout_name(spec.stages), force=True)
    try:
        now, best = plan(as_it_is, without), plan(request, without)
    except ShoalError:
        return None  # it has to move, or cannot: that is the mover's to say
    if best.name == now.name:
        return None
    gain = now.layout.cost_s / best.layout.cost_s if best.layout.cost_s > 0 else 1.0
    roomier = TIERS.index(best.tier) < TIERS.index(now.tier)
    if gain < _WORTH and not roomier:
        return None
    requests = in_flight(request)
    shown = [preview_of(p, without.facts, requests or len(p.layout.slices)) for p in (now, best)]
    return Rebalancing(instance=spec.id, model=spec.model, now=shown[0], better=shown[1], gain=round(gain, 3))


def _request(spec: InstanceSpec, world: World, layout: str = "") -> Place:
    """What was asked of the instance, as far as it can still be asked."""
    asked = structs.asdict(spec.asked)
    here = world.facts.keys() - world.drained
    # Of the nodes that were named, those that are there; with none of them it is refused as any request would be.
    asked["nodes"] = [n for n in spec.asked.nodes if n in here] or spec.asked.nodes
    asked["layers"] = {n: count for n, count in spec.asked.layers.items() if n in here}
    return Place(model=spec.model, context_tokens=spec.context_tokens, layout=layout, **asked)


def _as_if_stopped(spec: InstanceSpec, world: World) -> World:
    """The cluster without the instance: what its stages occupy is theirs again."""
    own = {stage_key(spec.id, s.rank) for s in spec.stages}
    facts = {n: _without_stages(f, own) for n, f in world.facts.items()}
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
