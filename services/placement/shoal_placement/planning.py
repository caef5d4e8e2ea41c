"""From a request and what is known of the cluster to a layout, its alternatives, or a refusal with figures. Pure.

The tiers are tried in order (`tiers.py`): what fits in free memory is never put where other programs would have to
give way. docs/placement.md.
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
"""Requests at once, where `throughput` is asked for and not said for how many."""
TIERS: tuple[Tier, ...] = ("fits", "tight", "force")
"""In the order in which they are tried."""


class Plan(msgspec.Struct, frozen=True):
    """A layout for a request."""

    model: ModelState
    shape: ModelShape
    layout: Layout
    context_tokens: int
    tier: Tier = "fits"
    asked: Asked = Asked()
    rooms: Mapping[str, Tiers] = {}
    """What each node had for one more stage."""
    links: Links = Links()

    @property
    def name(self) -> str:
        """The layout in a word, by which it can be asked for: `a:14,b:2`."""
        return ",".join(f"{s.node}:{s.last - s.first}" for s in self.layout.slices)


def layout_name(stages: Iterable[StageSpec]) -> str:
    """The same of stages that are placed already, in rank order."""
    return ",".join(f"{s.node}:{s.last_layer - s.first_layer}" for s in stages)


class _Question(msgspec.Struct, frozen=True):
    """A request that was understood: what is needed, and what each node has."""

    request: Place
    model: ModelState
    shape: ModelShape
    context_tokens: int
    need: Need
    facts: Mapping[str, Facts]
    rooms: Mapping[str, Tiers]
    lacks: Mapping[str, Sequence[float]]
    """Of each layer, how much of it a node would have to download: 0 to 1."""
    links: Links
    link_s: Floats
    """Between the nodes in the order of their names; empty: nothing is known."""

    def beside(self, node: str) -> int:
        """Bytes that any stage takes there beyond the need, which is that of a node that fuses attention."""
        return unfused_bytes(self.shape, self.context_tokens, self.facts[node])

    def problem(self, tier: Tier, in_flight: int) -> Problem:
        rooms = [
            Room(
                node,
                room.of(tier) - self.beside(node),
                s_per_byte=1 / reading_bytes_per_s(self.facts[node]),
                lacks=self.lacks[node],
            )
            for node, room in sorted(self.rooms.items())
        ]
        counts = self.request.min_nodes, self.request.max_nodes
        asked = problem_of(self.need, rooms, *counts, self.link_s, in_flight)
        return structs.replace(asked, counts=self.request.layers, max_fetch_bytes=self.request.max_fetch_bytes)

    def plan(self, layout: Layout, tier: Tier) -> Plan:
        asked = Asked(**{name: getattr(self.request, name) for name in Asked.__struct_fields__})
        return Plan(self.model, self.shape, layout, self.context_tokens, tier, asked, self.rooms, self.links)


def plan(request: Place, world: World) -> Plan:
    """The best layout of the first tier that has one. Raises NotFound, Unsupported, BadInput, or NoRoom with the
    figures of every node, and the tier that would do where that was not allowed."""
    asked = _understood(request, world)
    if request.layout:
        return _as_named(asked)
    allowed = allowed_tiers(request)
    for tier in TIERS:
        layout = solved(asked.problem(tier, in_flight(request)))
        if layout is not None and tier in allowed:
            return asked.plan(layout, tier)
        if layout is not None:
            raise _no_room(asked, tier)
    raise _no_room(asked, None)


def previews(request: Place, world: World) -> list[Plan]:
    """What could be chosen: for each number of nodes the best layout of the first tier that has one. The tier that
    a request allows does not matter here; what `plan` would choose comes first. Raises what `plan` raises."""
    asked = _understood(request, world)
    if request.layout:
        return [_as_named(structs.replace(asked, request=structs.replace(request, force=True)))]
    found: dict[int, Plan] = {}
    most = min(request.max_nodes, len(asked.rooms), len(asked.shape.layer_bytes))
    missing = list(range(request.min_nodes, most + 1))
    for tier in TIERS:
        if not missing:
            break
        problem = asked.problem(tier, in_flight(request))
        answers = preview(structs.replace(problem, min_nodes=missing[0], max_nodes=missing[-1]))
        for count in missing:
            if count in answers and (layout := answers[count].layout) is not None:
                found[count] = asked.plan(layout, tier)
        missing = [count for count in missing if count not in found]
    if not found:
        raise _no_room(asked, None)
    return sorted(found.values(), key=lambda p: (TIERS.index(p.tier), p.layout.cost_s, len(p.layout.slices)))


def candidates(found: Sequence[Plan]) -> list[str]:
    """The nodes whose links matter to a choice like these: those chosen, then those with the most memory."""
    chosen = dict.fromkeys(s.node for plan in found for s in plan.layout.slices)
    others = sorted(found[0].rooms, key=lambda node: (-found[0].rooms[node].fits_bytes, node))
    return list({**chosen, **dict.fromkeys(others)})


def held(model: str, world: World) -> bool:
    """Whether a live node has it."""
    try:
        find_model(model, world)
    except NotFound:
        return False
    return True


def with_unheld(world: World, model: str, size: ModelSize) -> World:
    """The cluster as if it had the model on a node that takes no part: all of it would have to be downloaded."""
    ref = ModelRef.parse(size.model)
    known = ModelState(
        node="",
        repo=ref.repo,
        commit=ref.revision,
        size_bytes=size.size_bytes,
        file_count=0,
        revisions=[ModelRef.parse(model).revision],
        shape=size.shape,
    )
    return structs.replace(world, models=[*world.models, known], alive={*world.alive, ""})


def allowed_tiers(request: Place) -> tuple[Tier, ...]:
    """Those up to the one that a request names."""
    return TIERS[: 3 if request.force else 2 if request.allow_low_memory else 1]


def in_flight(request: Place) -> int:
    """Requests at once that the layout is for; 0 for as many as it has stages. Raises BadInput."""
    if request.objective == "latency":
        return 1
    if request.objective == "balanced":
        return 0
    return request.in_flight or IN_FLIGHT


def _understood(request: Place, world: World) -> _Question:
    if not 1 <= request.min_nodes <= request.max_nodes:
        raise BadInput(f"min_nodes {request.min_nodes} and max_nodes {request.max_nodes} leave nothing to choose")
    if not 1 <= request.answers <= MOST_ANSWERS:
        raise BadInput(f"answers {request.answers}: there is room for 1 to {MOST_ANSWERS} at once")
    model = find_model(request.model, world)
    if model.shape is None:
        raise Unsupported(f"{model.repo} cannot be placed: {model.shape_error or 'its shape is not known'}")
    shape, context_tokens = model.shape, context_for(request.context_tokens, model.shape)
    named = {*request.nodes, *request.layers, *(node for node, _ in _named_layout(request.layout))}
    for node in {*named, *request.without}:
        check_node(node)
    unknown = sorted(named - set(world.facts))
    if unknown:
        raise NotFound(f"no inference service is live on {', '.join(unknown)}: see `shoal status`")
    drained = sorted(named & world.drained)
    if drained:
        raise BadInput(f"{', '.join(drained)} is drained: `shoal node drain {drained[0]} --undo` lets it work again")
    facts = {
        node: f
        for node, f in world.facts.items()
        if node not in world.drained and node not in request.without and (not request.nodes or node in request.nodes)
    }
    promised = promised_bytes(world.instances, world.models, world.facts)
    rooms = {node: tiers(own, promised.get(node, {})) for node, own in facts.items()}
    count = len(shape.layer_bytes)
    holders = {m.node for m in world.models if m.model == model.model}
    parts = {p.node: p for p in world.parts if p.model == model.model}
    arrived = _arrived(model, world.downloads)
    lacks = {n: [0.0] * count if n in holders else _lacks(parts.get(n), arrived.get(n, 0.0), count) for n in facts}
    need = need_of(shape, context_tokens, request.answers)
    link_s = world.links.costs_s(sorted(rooms), shape.hidden_bytes)
    return _Question(request, model, shape, context_tokens, need, facts, rooms, lacks, world.links, link_s)


def _lacks(part: PartState | None, arrived: float, count: int) -> list[float]:
    runs = part.layers if part is not None else []
    return [0.0 if any(first <= layer < end for first, end in runs) else 1.0 - arrived for layer in range(count)]


def _arrived(model: ModelState, downloads: Iterable[DownloadState]) -> dict[str, float]:
    """The share of a model that has come to each node by downloads that have not ended well, paused ones too."""
    return {
        d.node: min(d.done_bytes / model.size_bytes, 1.0)
        for d in downloads
        if d.commit == model.commit and d.model.partition("@")[0] == model.repo and model.size_bytes > 0
    }


def _named_layout(text: str) -> list[tuple[str, int]]:
    """`a:14,b:2` as nodes and their numbers of layers, in order. Raises BadInput."""
    found = []
    for part in text.split(",") if text else []:
        node, _, count = part.rpartition(":")
        if not node or not (count.isascii() and count.isdecimal() and 0 < int(count[:6]) < 100_000):
            raise BadInput(f"{text[:80]!r} is no layout: write nodes and numbers of layers, as previews do: a:14,b:2")
        found.append((node, int(count)))
    if len({node for node, _ in found}) < len(found):
        raise BadInput(f"{text[:80]!r} names a node twice")
    return found


def _as_named(asked: _Question) -> Plan:
    """The layout that a preview showed, if it still fits as it was allowed to."""
    named, layers = _named_layout(asked.request.layout), len(asked.shape.layer_bytes)
    if sum(count for _, count in named) != layers:
        raise BadInput(f"{asked.request.layout!r} does not have the model's {layers} layers")
    missing = [node for node, _ in named if node not in asked.rooms]
    if missing:
        raise BadInput(f"{', '.join(missing)} is left out by the request itself: see `nodes` and `without`")
    cuts = [0]
    for _, count in named:
        cuts.append(cuts[-1] + count)
    needed = [slice_bytes(asked.need, first, last) for first, last in pairwise(cuts)]
    each = [tier_of(own + asked.beside(n), asked.rooms[n]) for (n, _), own in zip(named, needed, strict=True)]
    if None in each:
        raise _no_room(asked, None)
    tier = max((t for t in each if t is not None), key=TIERS.index)
    if tier not in allowed_tiers(asked.request):
        raise _no_room(asked, tier)
    problem = asked.problem(tier, in_flight(asked.request))
    names = [node.name for node in problem.nodes]
    layout = layout_of(problem, [names.index(node) for node, _ in named], cuts)
    if not keeps(problem, layout):
        raise _no_room(asked, None)
    return asked.plan(layout, tier)


def _no_room(asked: _Question, would_do: Tier | None) -> NoRoom:
    """The refusal. `would_do`: the tier in which it could run, which the request does not allow."""
    need = asked.need
    whole = slice_bytes(need, 0, len(need.layer_bytes)) - need.stage_bytes
    free = sum(max(r.fits_bytes, 0) for r in asked.rooms.values())
    least = need.stage_bytes + max(need.layer_bytes)
    nodes = [
        {
            "node": node,
            "needed_bytes": least + asked.beside(node),
            "available_bytes": max(room.fits_bytes, 0),
            "tight_bytes": max(room.tight_bytes, 0),
            "total_bytes": asked.facts[node].memory_total_bytes,
        }
        for node, room in sorted(asked.rooms.items())
    ]
    figures = {"needed_bytes": whole, "available_bytes": free, "nodes": nodes, "model": asked.model.model}
    return NoRoom(
        f"{asked.model.repo} does not fit: {'. '.join(_why(asked, whole, would_do))}",
        **figures,
        **({"tier": would_do} if would_do else {}),
    )


def _why(asked: _Question, whole: int, would_do: Tier | None) -> Iterator[str]:
    request, need, rooms = asked.request, asked.need, asked.rooms
    if len(rooms) < request.min_nodes:
        yield f"{request.min_nodes} nodes were asked for and {len(rooms)} can take part"
        return
    if len(need.layer_bytes) < request.min_nodes:
        yield f"{request.min_nodes} nodes were asked for and the model has {len(need.layer_bytes)} layers"
        return
    each = ", ".join(f"{node} {_gb(max(room.fits_bytes, 0))}" for node, room in sorted(rooms.items()))
    stage_bytes = need.stage_bytes + max((asked.beside(node) for node in rooms), default=0)
    yield f"it needs {_gb(whole)} and {_gb(stage_bytes)} more per stage; free are {each or 'no nodes'}"
    less = "Stop an instance (`shoal ps`) or another program"
    if would_do == "tight":
        yield (
            f"{less}, or allow with --allow-low-memory that other programs give memory back: the nodes may swap, and "
            "answers take longer"
        )
    elif would_do == "force":
        yield f"{less}, or add a node; --force would try it without a reserve for the system"
    else:
        yield "Stop an instance (`shoal ps`), add a node, or ask for less context"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"


def spec_of(found: Plan, instance: str, created_at_s: float) -> InstanceSpec:
    """A plan as what is wanted of the nodes."""
    stages = [
        StageSpec(rank=rank, node=s.node, first_layer=s.first, last_layer=s.last)
        for rank, s in enumerate(found.layout.slices)
    ]
    return InstanceSpec(
        id=instance,
        repo=found.model.repo,
        commit=found.model.commit,
        stages=stages,
        context_tokens=found.context_tokens,
        created_at_s=created_at_s,
        asked=found.asked,
        tier=found.tier,
    )


def as_previews(found: Sequence[Plan], facts: Mapping[str, Facts], requests: int) -> Previews:
    """Plans for people and programs. `requests`: in flight, 0 for as many as there are stages."""
    return Previews(
        model=found[0].model.model,
        context_tokens=found[0].context_tokens,
        estimated=found[0].shape.estimated,
        previews=[preview_of(plan, facts, requests or len(plan.layout.slices)) for plan in found],
    )


def preview_of(plan: Plan, facts: Mapping[str, Facts], requests: int) -> Preview:
    """One plan for people and programs."""
    layout, nodes = plan.layout, [s.node for s in plan.layout.slices]
    needed = [s.bytes + unfused_bytes(plan.shape, plan.context_tokens, facts[s.node]) for s in layout.slices]
    onward = [plan.links.way(a, b) if a != b else None for a, b in pairwise([*nodes, nodes[0]])]
    return Preview(
        layout=plan.name,
        tier=plan.tier,
        is_low_memory=plan.tier != "fits",
        stages=[
            PreviewStage(
                node=s.node,
                first_layer=s.first,
                last_layer=s.last,
                needed_bytes=own,
                available_bytes=max(plan.rooms[s.node].fits_bytes, 0),
                tight_bytes=max(plan.rooms[s.node].tight_bytes, 0),
                total_bytes=facts[s.node].memory_total_bytes,
                freeing_bytes=max(own - plan.rooms[s.node].fits_bytes, 0),
                link_s=way.cost_s(plan.shape.hidden_bytes) if way is not None else 0.0,
                link_measured=way is not None and way.measured,
            )
            for s, own, way in zip(layout.slices, needed, onward, strict=True)
        ],
        tokens_per_s=round(requests / max(layout.latency_s, requests * layout.bottleneck_s), 3),
        first_token_s=round(layout.latency_s, 6),
        fetch_bytes=layout.fetch_bytes,
    )


def fitting(question: AskFits, world: World) -> Fits:
    """Every model that a live node holds, and how it could be placed for one answer at a time."""
    found = []
    for model in sorted({m.model: m for m in world.models if m.node in world.alive}.values(), key=lambda m: m.model):
        try:
            shape = model.shape
            context_tokens = min(question.context_tokens, shape.context_tokens) if shape is not None else 0
            best = previews(Place(model=model.model, context_tokens=context_tokens), world)[0]
        except (NoRoom, Unsupported) as e:
            found.append(Fit(model=model.model, size_bytes=model.size_bytes, why=e.message))
        else:
            shown = preview_of(best, world.facts, 1)
            found.append(Fit(model=model.model, size_bytes=model.size_bytes, tier=best.tier, preview=shown))
    last = len(TIERS)
    return Fits(models=sorted(found, key=lambda f: (TIERS.index(f.tier) if f.tier else last, -f.size_bytes)))
