"""The leader's decisions outside the solver: which model is meant, and the state of an instance. Pure."""

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
    StageSpec,
    StageState,
)
from shoal_common.names import DEFAULT_REVISION, LOCAL_REVISION, ModelRef
from shoal_placement.links import Links

DEFAULT_CONTEXT_TOKENS = 4096


class World(msgspec.Struct, frozen=True):
    """The facts about the cluster that a layout is chosen by."""

    facts: Mapping[str, Facts]
    """Of every inference service that is live and answers, by node."""
    models: Sequence[ModelState]
    instances: Sequence[InstanceSpec]
    alive: Set[str]
    """Nodes with any live service. A model that only other nodes hold is not available now."""
    parts: Sequence[PartState] = ()
    downloads: Sequence[DownloadState] = ()
    drained: Set[str] = frozenset()
    """Nodes where nothing may be placed."""
    links: Links = Links()


def find_model(text: str, world: World) -> ModelState:
    """Return the model that a name means: the named commit or revision, else the newest of the repository.

    Only models on live nodes count. Raises NotFound when there is none.
    """
    ref = ModelRef.parse(text)
    models = [m for m in world.models if m.repo == ref.repo and m.node in world.alive]
    if "@" in text:
        models = [m for m in models if ref.revision == m.commit or ref.revision in m.revisions]
    elif any(DEFAULT_REVISION in m.revisions for m in models):
        models = [m for m in models if DEFAULT_REVISION in m.revisions]
    else:
        models = [m for m in models if m.revisions != [LOCAL_REVISION]]
    if not models:
        raise NotFound(f"no live node holds {ref}: download it with `shoal pull {ref}`")
    # Some nodes may have failed to read the model's shape; one that could is enough.
    return max(models, key=lambda m: (m.shape is not None, m.ready_at_s, m.node))


def context_for(requested_tokens: int, shape: ModelShape) -> int:
    """Return the context length in tokens; 0 requested means the default. Raises BadInput above the model's limit."""
    if not 0 <= requested_tokens <= shape.context_tokens:
        raise BadInput(
            f"the model's context is at most {shape.context_tokens} tokens; {requested_tokens} were requested"
        )
    return requested_tokens or min(shape.context_tokens, DEFAULT_CONTEXT_TOKENS)


def instance_id(repo: str, command: str) -> str:
    """Return a short readable id, the same for the same command: `tiny-fish-3f2a1c`."""
    stem = re.sub(r"[^a-z0-9]+", "-", repo.rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    return f"{stem or 'model'}-{hashlib.sha256(command.encode()).hexdigest()[:6]}"


def instance_state(
    spec: InstanceSpec,
    stages: Iterable[StageState],
    live: Iterable[str],
    before: InstanceState | None,
    stays_because: ErrorBody | None = None,
) -> InstanceState:
    """Return the state of an instance: ready when all stages are; degraded when it was ready and a stage is not.

    A forced stage that was killed on OOM is not started again, so its instance is failed even if it was ready before.
    `stays_because`: why an instance that should move to other nodes cannot.
    """
    present = set(live)
    own = _own_stages(spec, stages)
    ready = [s.rank for s in spec.stages if s.rank in own and own[s.rank].phase == "ready" and s.node in present]
    failed = [own[s.rank].error for s in spec.stages if s.rank in own and own[s.rank].phase == "failed"]
    oom_killed = any(error is not None and error.code == NoRoom.code for error in failed)
    was_up = before is not None and before.epoch == spec.epoch and before.phase in ("ready", "degraded")
    if len(ready) == len(spec.stages):
        phase, error = "ready", None
    elif was_up and not oom_killed:
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


def has_degraded(before: InstanceState | None, now: InstanceState) -> bool:
    """Return whether an instance has become degraded since `before` was published."""
    was_degraded = before is not None and before.phase == "degraded" and before.epoch == now.epoch
    return now.phase == "degraded" and not was_degraded


def stages_not_ready(spec: InstanceSpec, stages: Iterable[StageState], live: Set[str]) -> list[tuple[StageSpec, str]]:
    """Return the stages of an instance that are not ready, in rank order, each with the reason."""
    own = _own_stages(spec, stages)
    missing = []
    for stage in spec.stages:
        state = own.get(stage.rank)
        if stage.node not in live:
            missing.append((stage, f"node {stage.node} is down"))
        elif state is None:
            missing.append((stage, f"rank {stage.rank} does not run on {stage.node}"))
        elif state.phase != "ready":
            error = f": {state.error.message}" if state.error is not None else ""
            missing.append((stage, f"rank {stage.rank} on {stage.node} is {state.phase}{error}"))
    return missing


def _own_stages(spec: InstanceSpec, stages: Iterable[StageState]) -> dict[int, StageState]:
    return {s.rank: s for s in stages if s.instance == spec.id and s.epoch == spec.epoch}
