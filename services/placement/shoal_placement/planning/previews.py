"""Plans as previews for people, and which models would fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from shoal_common.errors import NoRoom, Unsupported
from shoal_common.messages.liveness import Facts
from shoal_common.messages.placement import AskFits, Fit, Fits, Place, Preview, Previews, PreviewStage
from shoal_placement.planning.cluster_facts import World
from shoal_placement.planning.memory_model import unfused_bytes
from shoal_placement.planning.plan import TIERS, Plan
from shoal_placement.planning.planner import previews


def as_previews(plans: Sequence[Plan], facts: Mapping[str, Facts], requests: int) -> Previews:
    """Return plans as previews. `requests`: in flight; 0: as many as there are stages."""
    return Previews(
        model=plans[0].model.model,
        context_tokens=plans[0].context_tokens,
        estimated=plans[0].shape.estimated,
        previews=[preview_of(plan, facts, requests or len(plan.layout.slices)) for plan in plans],
    )


def preview_of(plan: Plan, facts: Mapping[str, Facts], requests: int) -> Preview:
    """Return a plan as a preview."""
    layout, nodes = plan.layout, [s.node for s in plan.layout.slices]
    needed = [s.bytes + unfused_bytes(plan.shape, plan.context_tokens, facts[s.node]) for s in layout.slices]
    next_links = [plan.links.way(a, b) if a != b else None for a, b in pairwise([*nodes, nodes[0]])]
    return Preview(
        layout=plan.name,
        tier=plan.tier,
        is_low_memory=plan.tier != "fits",
        stages=[
            PreviewStage(
                node=s.node,
                first_layer=s.first,
                last_layer=s.last,
                needed_bytes=size_bytes,
                available_bytes=max(plan.rooms[s.node].fits_bytes, 0),
                tight_bytes=max(plan.rooms[s.node].tight_bytes, 0),
                total_bytes=facts[s.node].memory_total_bytes,
                freeing_bytes=max(size_bytes - plan.rooms[s.node].fits_bytes, 0),
                link_s=link.cost_s(plan.shape.hidden_bytes) if link is not None else 0.0,
                link_measured=link is not None and link.measured,
            )
            for s, size_bytes, link in zip(layout.slices, needed, next_links, strict=True)
        ],
        tokens_per_s=round(requests / max(layout.latency_s, requests * layout.bottleneck_s), 3),
        first_token_s=round(layout.latency_s, 6),
        fetch_bytes=layout.fetch_bytes,
    )


def fitting(question: AskFits, world: World) -> Fits:
    """Return every model that a live node holds, and how it could be placed for one answer at a time."""
    fits = []
    for model in sorted({m.model: m for m in world.models if m.node in world.alive}.values(), key=lambda m: m.model):
        try:
            shape = model.shape
            context_tokens = min(question.context_tokens, shape.context_tokens) if shape is not None else 0
            best = previews(Place(model=model.model, context_tokens=context_tokens), world)[0]
        except (NoRoom, Unsupported) as e:
            fits.append(Fit(model=model.model, size_bytes=model.size_bytes, why=e.message))
        else:
            shown = preview_of(best, world.facts, 1)
            fits.append(Fit(model=model.model, size_bytes=model.size_bytes, tier=best.tier, preview=shown))
    last = len(TIERS)
    return Fits(models=sorted(fits, key=lambda f: (TIERS.index(f.tier) if f.tier else last, -f.size_bytes)))
