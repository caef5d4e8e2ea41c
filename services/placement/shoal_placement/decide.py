"""What the leader decides around the solver: which model, what is free, how an instance stands. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence, Set

import msgspec

from shoal_common.errors import BadInput, ErrorBody, NoRoom, NotFound
from shoal_common.messages.facts import Facts
from shoal_common.messages.records import (
    DownloadState,
    InstanceSpec,
    InstanceState,
    ModelShape,
    ModelState,
    PartState,
    StageState,
)
from shoal_common.names import DEFAULT_REVISION, LOCAL_REVISION, ModelRef
from shoal_placement.links import Links

DEFAULT_CONTEXT_TOKENS = 4096


class World(msgspec.Struct, frozen=True):
    """What the leader sees of the cluster."""

    facts: Mapping[str, Facts]
    """Facts of every live inference service, by node."""
    models: Sequence[ModelState]
    instances: Sequence[InstanceSpec]
    alive: Set[str]
    """Nodes with any live service: what only others hold cannot be had now."""
    parts: Sequence[PartState] = ()
    downloads: Sequence[DownloadState] = ()
    drained: Set[str] = frozenset()
    """Nodes on which people want nothing to run."""
    links: Links = Links()


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


def instance_id(repo: str, command: str) -> str:
    """A short readable id that the same command always gets: `tiny-fish-3f2a1c`."""
    stem = re.sub(r"[^a-z0-9]+", "-", repo.rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    return f"{stem or 'model'}-{hashlib.sha256(command.encode()).hexdigest()[:6]}"


def instance_state(
    spec: InstanceSpec,
    stages: Iterable[StageState],
    live: Iterable[str],
    before: InstanceState | None,
    stays_because: ErrorBody | None = None,
) -> InstanceState:
    """How an instance stands: ready when all its stages are; degraded when it was and one is not any more.

    One that was forced and had to give way does not come back, so it has failed, whatever it was.
    `stays_because`: why one that should move to other nodes cannot.
    """
    here = set(live)
    own = {s.rank: s for s in stages if s.instance == spec.id and s.epoch == spec.epoch}
    ready = [s.rank for s in spec.stages if s.rank in own and own[s.rank].phase == "ready" and s.node in here]
    failed = [own[s.rank].error for s in spec.stages if s.rank in own and own[s.rank].phase == "failed"]
    gave_way = any(error is not None and error.code == NoRoom.code for error in failed)
    was_up = before is not None and before.epoch == spec.epoch and before.phase in ("ready", "degraded")
    if len(ready) == len(spec.stages):
        phase, error = "ready", None
    elif was_up and not gave_way:
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
