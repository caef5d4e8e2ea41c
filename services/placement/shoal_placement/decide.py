"""What the leader decides around the solver: which model, what is free, how an instance stands. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence, Set

import msgspec
from msgspec import structs

from shoal_common.errors import BadInput, ErrorBody, NoRoom, NotFound, Unsupported
from shoal_common.messages.commands import Place
from shoal_common.messages.facts import Facts
from shoal_common.messages.records import (
    Asked,
    InstanceSpec,
    InstanceState,
    ModelShape,
    ModelState,
    StageSpec,
    StageState,
)
from shoal_common.names import DEFAULT_REVISION, LOCAL_REVISION, ModelRef
from shoal_placement.need import need_of, promised_bytes, unfused_bytes
from shoal_placement.solve import Layout, Need, Room, slice_bytes, solve
from shoal_placement.tiers import tiers

DEFAULT_CONTEXT_TOKENS = 4096


class World(msgspec.Struct, frozen=True):
    """What the leader sees of the cluster."""

    facts: Mapping[str, Facts]
    """Facts of every live inference service, by node."""
    models: Sequence[ModelState]
    instances: Sequence[InstanceSpec]
    alive: Set[str]
    """Nodes with any live service: what only others hold cannot be had now."""
    drained: Set[str] = frozenset()
    """Nodes on which people want nothing to run."""


class Plan(msgspec.Struct, frozen=True):
    """A layout for a request."""

    model: ModelState
    shape: ModelShape
    layout: Layout
    context_tokens: int
    asked: Asked = Asked()


def find_model(text: str, world: World) -> ModelState:
    """The model a person means, as a live node holds it: that commit or revision, or the newest of the repo.

    Raises NotFound when none does.
    """
    ref = ModelRef.parse(text)
    found = [m for m in world.models if m.repo == ref.repo and m.node in world.alive]
    if "@" in text:
        found = [m for m in found if ref.revision == m.commit or ref.revision in m.revisions]
    elif any(DEFAULT_REVISION in m.revisions for m in found):
        found = [m for m in found if DEFAULT_REVISION in m.revisions]
    else:
        found = [m for m in found if m.revisions != [LOCAL_REVISION]]
    if not found:
        raise NotFound(f"no live node holds {ref}: bring it in with `shoal pull {ref}`")
    # Nodes may differ in why they could not read a shape; one that could is enough.
    return max(found, key=lambda m: (m.shape is not None, m.ready_at_s, m.node))


def context_for(asked_tokens: int, shape: ModelShape) -> int:
    """Tokens of context to keep room for. Raises BadInput for more than the model has."""
    if not 0 <= asked_tokens <= shape.context_tokens:
        raise BadInput(f"the model has a context of {shape.context_tokens} tokens; {asked_tokens} were asked for")
    return asked_tokens or min(shape.context_tokens, DEFAULT_CONTEXT_TOKENS)


def plan(request: Place, world: World) -> Plan:
    """A layout for a request, or the refusal: NotFound, Unsupported, BadInput, NoRoom with every node's figures."""
    if not 1 <= request.min_nodes <= request.max_nodes:
        raise BadInput(f"min_nodes {request.min_nodes} and max_nodes {request.max_nodes} leave nothing to choose")
    model = find_model(request.model, world)
    if model.shape is None:
        raise Unsupported(f"{model.repo} cannot be placed: {model.shape_error or 'its shape is not known'}")
    context_tokens = context_for(request.context_tokens, model.shape)
    need = need_of(model.shape, context_tokens)
    promised = promised_bytes(world.instances, world.models, world.facts)
    holders = {m.node for m in world.models if m.model == model.model}
    unknown = sorted(set(request.nodes) - set(world.facts))
    if unknown:
        raise NotFound(f"no inference service is live on {', '.join(unknown)}: see `shoal status`")
    drained = sorted(set(request.nodes) & world.drained)
    if drained:
        raise BadInput(f"{', '.join(drained)} is drained: `shoal node drain {drained[0]} --undo` lets it work again")
    able = {n: f for n, f in world.facts.items() if n not in world.drained}
    usable = {n: f for n, f in able.items() if not request.nodes or n in request.nodes}
    rooms = [
        Room(
            node,
            tiers(facts, promised.get(node, {})).fits_bytes - unfused_bytes(model.shape, context_tokens, facts),
            node in holders,
        )
        for node, facts in sorted(usable.items())
    ]
    layout = solve(need, rooms, request.min_nodes, request.max_nodes)
    if layout is None:
        raise _no_room(model, need, rooms, usable, request)
    asked = Asked(**{name: getattr(request, name) for name in Asked.__struct_fields__})
    return Plan(model, model.shape, layout, context_tokens, asked)


def _no_room(
    model: ModelState, need: Need, rooms: Sequence[Room], facts: Mapping[str, Facts], request: Place
) -> NoRoom:
    whole = slice_bytes(need, 0, len(need.layer_bytes)) - need.stage_bytes
    free = sum(max(r.free_bytes, 0) for r in rooms)
    nodes = [
        {
            "node": r.node,
            "needed_bytes": need.stage_bytes + max(need.layer_bytes),
            "available_bytes": max(r.free_bytes, 0),
            "total_bytes": facts[r.node].memory_total_bytes,
        }
        for r in rooms
    ]
    if len(rooms) < request.min_nodes:
        why = f"{request.min_nodes} nodes were asked for and {len(rooms)} can take part"
    elif len(need.layer_bytes) < request.min_nodes:
        why = f"{request.min_nodes} nodes were asked for and the model has {len(need.layer_bytes)} layers"
    else:
        free_each = ", ".join(f"{r.node} {_gb(max(r.free_bytes, 0))}" for r in rooms)
        why = (
            f"it needs {_gb(whole)} and {_gb(need.stage_bytes)} more per stage; free are {free_each or 'no nodes'}. "
            "Stop an instance (`shoal ps`), add a node, or ask for less context"
        )
    return NoRoom(
        f"{model.repo} does not fit: {why}", needed_bytes=whole, available_bytes=free, nodes=nodes, model=model.model
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.3g} GB"


def instance_id(repo: str, command: str) -> str:
    """A short readable id that the same command always gets: `tiny-fish-3f2a1c`."""
    stem = re.sub(r"[^a-z0-9]+", "-", repo.rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    return f"{stem or 'model'}-{hashlib.sha256(command.encode()).hexdigest()[:6]}"


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
    )


def placed_anew(spec: InstanceSpec, world: World) -> InstanceSpec:
    """The instance as it could run now, as it was asked for. Raises what `plan` raises."""
    asked = {name: getattr(spec.asked, name) for name in Asked.__struct_fields__}
    # Of the nodes that were named, those that are there; with none of them it is refused as any request would be.
    asked["nodes"] = [n for n in spec.asked.nodes if n in world.facts.keys() - world.drained] or spec.asked.nodes
    request = Place(model=spec.model, context_tokens=spec.context_tokens, **asked)
    others = [s for s in world.instances if s.id != spec.id]
    found = plan(request, structs.replace(world, instances=others))
    fresh = spec_of(found, spec.id, spec.created_at_s)
    return structs.replace(fresh, epoch=spec.epoch + 1, asked=spec.asked)


def instance_state(
    spec: InstanceSpec,
    stages: Iterable[StageState],
    live: Iterable[str],
    before: InstanceState | None,
    stays_because: ErrorBody | None = None,
) -> InstanceState:
    """How an instance stands: ready when all its stages are; degraded when it was and one is not any more.

    `stays_because`: why one that should move to other nodes cannot.
    """
    here = set(live)
    own = {s.rank: s for s in stages if s.instance == spec.id and s.epoch == spec.epoch}
    ready = [s.rank for s in spec.stages if s.rank in own and own[s.rank].phase == "ready" and s.node in here]
    failed = [own[s.rank].error for s in spec.stages if s.rank in own and own[s.rank].phase == "failed"]
    was_up = before is not None and before.epoch == spec.epoch and before.phase in ("ready", "degraded")
    if len(ready) == len(spec.stages):
        phase, error = "ready", None
    elif was_up:
        phase, error = "degraded", next((e for e in failed if e is not None), stays_because)
    elif failed:
        phase, error = "failed", next((e for e in failed if e is not None), None)
    else:
        phase, error = "starting", stays_because
    return InstanceState(
        id=spec.id,
        repo=spec.repo,
        commit=spec.commit,
        phase=phase,  # type: ignore[arg-type]  # one of the four literals above
        nodes=[s.node for s in spec.stages],
        epoch=spec.epoch,
        error=error,
    )
