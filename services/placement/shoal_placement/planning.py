"""The planner: from a request and the cluster's facts to a layout, its alternatives, or a refusal with figures. Pure.

The memory tiers are tried in order (`memory_tiers.py`): a model that fits in free memory is never placed where other
programs would have to free some. See docs/placement.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec
from msgspec import structs

from shoal_common.errors import BadInput, NoRoom, NotFound, Unsupported
from shoal_common.messages.commands import Place
from shoal_common.messages.facts import Facts
from shoal_common.messages.questions import AskFits, Fit, Fits, ModelSize, Preview, Previews, PreviewStage
from shoal_common.messages.records import (
    Asked,
    DownloadState,
    InstanceSpec,
    ModelShape,
    ModelState,
    PartState,
    StageSpec,
)
from shoal_common.names import ModelRef, check_node
from shoal_placement.decide import World, context_for, find_model
from shoal_placement.links import Links
from shoal_placement.need import need_of, promised_bytes, reading_bytes_per_s, unfused_bytes
from shoal_placement.solve import Layout, Need, Problem, Room, problem_of, slice_bytes, solved
from shoal_placement.solve.answers import preview
from shoal_placement.solve.cost import Floats, keeps, layout_of
from shoal_placement.tiers import Tier, Tiers, tier_of, tiers

MOST_ANSWERS = 64
IN_FLIGHT = 4
"""Requests in flight for the objective `throughput`, if the request names no number."""
TIERS: tuple[Tier, ...] = ("fits", "tight", "force")
"""In the order in which they are tried."""


class Plan(msgspec.Struct, frozen=True):
    """The layout chosen for a request."""

    model: ModelState
    shape: ModelShape
    layout: Layout
    context_tokens: int
    tier: Tier = "fits"
    asked: Asked = Asked()
    rooms: Mapping[str, Tiers] = {}
    """The memory budget of each node for one more stage."""
    links: Links = Links()

    @property
    def name(self) -> str:
        """The name by which the layout can be requested: `a:14,b:2`."""
        return ",".join(f"{s.node}:{s.last - s.first}" for s in self.layout.slices)


def layout_name(stages: Iterable[StageSpec]) -> str:
    """Return the name of the layout of placed stages, given in rank order."""
    return ",".join(f"{s.node}:{s.last_layer - s.first_layer}" for s in stages)


class _Question(msgspec.Struct, frozen=True):
    """A resolved request: what the model needs, and what each node has."""

    request: Place
    model: ModelState
    shape: ModelShape
    context_tokens: int
    need: Need
    facts: Mapping[str, Facts]
    rooms: Mapping[str, Tiers]
    lacks: Mapping[str, Sequence[float]]
    """By node, the share of each layer that it would have to download: 0 to 1."""
    links: Links
    link_s: Floats
    """Between the nodes in the order of their names; empty: unknown."""

    def unfused(self, node: str) -> int:
        """Return the bytes that a stage takes on this node beyond `need`, which assumes fused attention."""
        return unfused_bytes(self.shape, self.context_tokens, self.facts[node])

    def problem(self, tier: Tier, in_flight: int) -> Problem:
        capacities = [
            Room(
                node,
                budget.of(tier) - self.unfused(node),
                s_per_byte=1 / reading_bytes_per_s(self.facts[node]),
                lacks=self.lacks[node],
            )
            for node, budget in sorted(self.rooms.items())
        ]
        counts = self.request.min_nodes, self.request.max_nodes
        problem = problem_of(self.need, capacities, *counts, self.link_s, in_flight)
        return structs.replace(problem, counts=self.request.layers, max_fetch_bytes=self.request.max_fetch_bytes)

    def plan(self, layout: Layout, tier: Tier) -> Plan:
        asked = Asked(**{name: getattr(self.request, name) for name in Asked.__struct_fields__})
        return Plan(self.model, self.shape, layout, self.context_tokens, tier, asked, self.rooms, self.links)


def plan(request: Place, world: World) -> Plan:
    """Return the best layout of the first tier that has one.

    Raises NotFound, Unsupported, BadInput, or NoRoom with the figures of every node and, if the model fits only in a
    tier that the request does not allow, that tier.
    """
    resolved = _resolve_request(request, world)
    if request.layout:
        return _plan_named_layout(resolved)
    allowed = allowed_tiers(request)
    for tier in TIERS:
        layout = solved(resolved.problem(tier, in_flight(request)))
        if layout is not None and tier in allowed:
            return resolved.plan(layout, tier)
        if layout is not None:
            raise _no_room(resolved, tier)
    raise _no_room(resolved, None)


def previews(request: Place, world: World) -> list[Plan]:
    """Return for each number of nodes the best layout of the first tier that has one, whatever the request allows.

    The layout that `plan` would choose comes first. Raises what `plan` raises.
    """
    resolved = _resolve_request(request, world)
    if request.layout:
        return [_plan_named_layout(structs.replace(resolved, request=structs.replace(request, force=True)))]
    plans: dict[int, Plan] = {}
    max_count = min(request.max_nodes, len(resolved.rooms), len(resolved.shape.layer_bytes))
    missing = list(range(request.min_nodes, max_count + 1))
    for tier in TIERS:
        if not missing:
            break
        problem = resolved.problem(tier, in_flight(request))
        answers = preview(structs.replace(problem, min_nodes=missing[0], max_nodes=missing[-1]))
        for count in missing:
            if count in answers and (layout := answers[count].layout) is not None:
                plans[count] = resolved.plan(layout, tier)
        missing = [count for count in missing if count not in plans]
    if not plans:
        raise _no_room(resolved, None)
    return sorted(plans.values(), key=lambda p: (TIERS.index(p.tier), p.layout.cost_s, len(p.layout.slices)))


def candidates(plans: Sequence[Plan]) -> list[str]:
    """Return the nodes whose links matter to such a choice: the chosen ones, then those with the most memory."""
    chosen = dict.fromkeys(s.node for plan in plans for s in plan.layout.slices)
    others = sorted(plans[0].rooms, key=lambda node: (-plans[0].rooms[node].fits_bytes, node))
    return list({**chosen, **dict.fromkeys(others)})


def held(model: str, world: World) -> bool:
    """Return whether a live node has the model."""
    try:
        find_model(model, world)
    except NotFound:
        return False
    return True


def with_unheld(world: World, model: str, size: ModelSize) -> World:
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
    return structs.replace(world, models=[*world.models, remote], alive={*world.alive, ""})


def allowed_tiers(request: Place) -> tuple[Tier, ...]:
    """Return the tiers that a request allows."""
    return TIERS[: 3 if request.force else 2 if request.allow_low_memory else 1]


def in_flight(request: Place) -> int:
    """Return the requests in flight that the layout is for; 0: as many as it has stages. Raises BadInput."""
    if request.objective == "latency":
        return 1
    if request.objective == "balanced":
        return 0
    return request.in_flight or IN_FLIGHT


def _resolve_request(request: Place, world: World) -> _Question:
    if not 1 <= request.min_nodes <= request.max_nodes:
        raise BadInput(
            f"min_nodes {request.min_nodes} and max_nodes {request.max_nodes}: "
            "min_nodes must be at least 1 and at most max_nodes"
        )
    if not 1 <= request.answers <= MOST_ANSWERS:
        raise BadInput(f"answers {request.answers}: must be from 1 to {MOST_ANSWERS}")
    model = find_model(request.model, world)
    if model.shape is None:
        raise Unsupported(f"{model.repo} cannot be placed: {model.shape_error or 'its shape is unknown'}")
    shape, context_tokens = model.shape, context_for(request.context_tokens, model.shape)
    named = {*request.nodes, *request.layers, *(node for node, _ in _named_layout(request.layout))}
    for node in {*named, *request.without}:
        check_node(node)
    unknown = sorted(named - set(world.facts))
    if unknown:
        raise NotFound(f"no inference service is live on {', '.join(unknown)}: see `shoal status`")
    drained = sorted(named & world.drained)
    if drained:
        raise BadInput(f"drained: {', '.join(drained)}; to use it again, run `shoal node drain {drained[0]} --undo`")
    facts = {
        node: f
        for node, f in world.facts.items()
        if node not in world.drained and node not in request.without and (not request.nodes or node in request.nodes)
    }
    reserved = promised_bytes(world.instances, world.models, world.facts)
    budgets = {node: tiers(f, reserved.get(node, {})) for node, f in facts.items()}
    count = len(shape.layer_bytes)
    holders = {m.node for m in world.models if m.model == model.model}
    shards = {p.node: p for p in world.parts if p.model == model.model}
    downloaded = _downloaded(model, world.downloads)
    lacks = {
        n: [0.0] * count if n in holders else _missing_shares(shards.get(n), downloaded.get(n, 0.0), count)
        for n in facts
    }
    need = need_of(shape, context_tokens, request.answers)
    link_s = world.links.costs_s(sorted(budgets), shape.hidden_bytes)
    return _Question(request, model, shape, context_tokens, need, facts, budgets, lacks, world.links, link_s)


def _missing_shares(shard: PartState | None, downloaded: float, count: int) -> list[float]:
    ranges = shard.layers if shard is not None else []
    return [0.0 if any(first <= layer < end for first, end in ranges) else 1.0 - downloaded for layer in range(count)]


def _downloaded(model: ModelState, downloads: Iterable[DownloadState]) -> dict[str, float]:
    """Return the share of a model that each node has from unfinished downloads, paused ones included."""
    return {
        d.node: min(d.done_bytes / model.size_bytes, 1.0)
        for d in downloads
        if d.commit == model.commit and d.model.partition("@")[0] == model.repo and model.size_bytes > 0
    }


def _named_layout(text: str) -> list[tuple[str, int]]:
    """Parse `a:14,b:2` into nodes and their numbers of layers, in order. Raises BadInput."""
    stages = []
    for word in text.split(",") if text else []:
        node, _, count = word.rpartition(":")
        if not node or not (count.isascii() and count.isdecimal() and 0 < int(count[:6]) < 100_000):
            raise BadInput(f"{text[:80]!r} is not a layout: write nodes and numbers of layers, like a:14,b:2")
        stages.append((node, int(count)))
    if len({node for node, _ in stages}) < len(stages):
        raise BadInput(f"layout {text[:80]!r} names a node twice")
    return stages


def _plan_named_layout(resolved: _Question) -> Plan:
    """Return the plan for the layout that the request names. Raises NoRoom if it does not fit in an allowed tier."""
    named, layers = _named_layout(resolved.request.layout), len(resolved.shape.layer_bytes)
    if sum(count for _, count in named) != layers:
        raise BadInput(f"layout {resolved.request.layout!r} must have {layers} layers in all, as the model has")
    excluded = [node for node, _ in named if node not in resolved.rooms]
    if excluded:
        raise BadInput(f"the layout names {', '.join(excluded)}, which `nodes` or `without` of the request exclude")
    cuts = [0]
    for _, count in named:
        cuts.append(cuts[-1] + count)
    needed = [slice_bytes(resolved.need, first, last) for first, last in pairwise(cuts)]
    stage_tiers = [
        tier_of(size + resolved.unfused(n), resolved.rooms[n]) for (n, _), size in zip(named, needed, strict=True)
    ]
    if None in stage_tiers:
        raise _no_room(resolved, None)
    tier = max((t for t in stage_tiers if t is not None), key=TIERS.index)
    if tier not in allowed_tiers(resolved.request):
        raise _no_room(resolved, tier)
    problem = resolved.problem(tier, in_flight(resolved.request))
    names = [node.name for node in problem.nodes]
    layout = layout_of(problem, [names.index(node) for node, _ in named], cuts)
    if not keeps(problem, layout):
        raise _no_room(resolved, None)
    return resolved.plan(layout, tier)


def _no_room(resolved: _Question, fitting_tier: Tier | None) -> NoRoom:
    """Return the refusal. `fitting_tier`: the tier in which the model would fit, which the request does not allow."""
    need = resolved.need
    model_bytes = slice_bytes(need, 0, len(need.layer_bytes)) - need.stage_bytes
    free_bytes = sum(max(budget.fits_bytes, 0) for budget in resolved.rooms.values())
    one_layer_bytes = need.stage_bytes + max(need.layer_bytes)
    nodes = [
        {
            "node": node,
            "needed_bytes": one_layer_bytes + resolved.unfused(node),
            "available_bytes": max(budget.fits_bytes, 0),
            "tight_bytes": max(budget.tight_bytes, 0),
            "total_bytes": resolved.facts[node].memory_total_bytes,
        }
        for node, budget in sorted(resolved.rooms.items())
    ]
    figures = {
        "needed_bytes": model_bytes,
        "available_bytes": free_bytes,
        "nodes": nodes,
        "model": resolved.model.model,
    }
    return NoRoom(
        f"{resolved.model.repo} does not fit: {'. '.join(_reasons(resolved, model_bytes, fitting_tier))}",
        **figures,
        **({"tier": fitting_tier} if fitting_tier else {}),
    )


def _reasons(resolved: _Question, model_bytes: int, fitting_tier: Tier | None) -> Iterator[str]:
    request, need, budgets = resolved.request, resolved.need, resolved.rooms
    if len(budgets) < request.min_nodes:
        yield f"needs {request.min_nodes} nodes; {len(budgets)} available"
        return
    if len(need.layer_bytes) < request.min_nodes:
        yield f"needs {request.min_nodes} nodes; the model has only {len(need.layer_bytes)} layers"
        return
    free = ", ".join(f"{node} {_gb(max(budget.fits_bytes, 0))}" for node, budget in sorted(budgets.items()))
    stage_bytes = need.stage_bytes + max((resolved.unfused(node) for node in budgets), default=0)
    yield f"it needs {_gb(model_bytes)}, and {_gb(stage_bytes)} more per stage; free: {free or 'no nodes'}"
    stop = "Stop an instance (`shoal ps`) or another program"
    if fitting_tier == "tight":
        yield (
            f"{stop}, or use --allow-low-memory to take memory that other programs use: the nodes may swap, and "
            "answers take longer"
        )
    elif fitting_tier == "force":
        yield f"{stop}, or add a node; --force also takes the memory reserved for the system"
    else:
        yield "Stop an instance (`shoal ps`), add a node, or request a shorter context"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"


def spec_of(plan: Plan, instance: str, created_at_s: float) -> InstanceSpec:
    """Return the spec of the instance that runs a plan."""
    stages = [
        StageSpec(rank=rank, node=s.node, first_layer=s.first, last_layer=s.last)
        for rank, s in enumerate(plan.layout.slices)
    ]
    return InstanceSpec(
        id=instance,
        repo=plan.model.repo,
        commit=plan.model.commit,
        stages=stages,
        context_tokens=plan.context_tokens,
        created_at_s=created_at_s,
        asked=plan.asked,
        tier=plan.tier,
    )


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
