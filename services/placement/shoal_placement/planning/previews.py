"""Plans as previews for people, and which models would fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from shoal_common.errors import NoMemory, Unsupported
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.placement import (
    FittingModel,
    FittingModels,
    ListFits,
    PlaceCommand,
    Preview,
    Previews,
    PreviewStage,
)
from shoal_placement.planning.cluster_facts import ClusterFacts
from shoal_placement.planning.memory_model import unfused_bytes
from shoal_placement.planning.plan import TIERS, PlacementPlan
from shoal_placement.planning.planner import plan_previews


def to_previews(plans: Sequence[PlacementPlan], facts: Mapping[str, NodeFacts], requests: int) -> Previews:
    """Return plans as previews. `requests`: in flight; 0: as many as there are stages."""
    return Previews(
        model=plans[0].model.model,
        context_tokens=plans[0].context_tokens,
        estimated=plans[0].shape.estimated,
        previews=[to_preview(plan, facts, requests or len(plan.layout.slices)) for plan in plans],
    )


def to_preview(plan: PlacementPlan, facts: Mapping[str, NodeFacts], requests: int) -> Preview:
    """Return a plan as a preview."""
    layout, nodes = plan.layout, [s.node for s in plan.layout.slices]
    needed = [s.bytes + unfused_bytes(plan.shape, plan.context_tokens, facts[s.node]) for s in layout.slices]
    next_links = [plan.network.link_between(a, b) if a != b else None for a, b in pairwise([*nodes, nodes[0]])]
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
                available_bytes=max(plan.budgets[s.node].fits_bytes, 0),
                tight_bytes=max(plan.budgets[s.node].tight_bytes, 0),
                total_bytes=facts[s.node].memory_total_bytes,
                bytes_to_free=max(size_bytes - plan.budgets[s.node].fits_bytes, 0),
                link_s=link.cost_s(plan.shape.hidden_bytes) if link is not None else 0.0,
                link_measured=link is not None and link.measured,
            )
            for s, size_bytes, link in zip(layout.slices, needed, next_links, strict=True)
        ],
        tokens_per_s=round(requests / max(layout.latency_s, requests * layout.bottleneck_s), 3),
        first_token_s=round(layout.latency_s, 6),
        fetch_bytes=layout.fetch_bytes,
    )


def list_fitting_models(request: ListFits, cluster: ClusterFacts) -> FittingModels:
    """Return every model that a live node holds, and how it could be placed for one answer at a time."""
    fits = []
    for model in sorted(
        {m.model: m for m in cluster.models if m.node in cluster.live_nodes}.values(), key=lambda m: m.model
    ):
        try:
            shape = model.shape
            context_tokens = min(request.context_tokens, shape.context_tokens) if shape is not None else 0
            best = plan_previews(PlaceCommand(model=model.model, context_tokens=context_tokens), cluster)[0]
        except (NoMemory, Unsupported) as e:
            fits.append(FittingModel(model=model.model, size_bytes=model.size_bytes, reason=e.message))
        else:
            preview = to_preview(best, cluster.inference_facts, 1)
            fits.append(FittingModel(model=model.model, size_bytes=model.size_bytes, tier=best.tier, preview=preview))
    last = len(TIERS)
    return FittingModels(models=sorted(fits, key=lambda f: (TIERS.index(f.tier) if f.tier else last, -f.size_bytes)))
