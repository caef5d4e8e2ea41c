"""The state of an instance, from its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import msgspec

from shoal_common.errors import ErrorBody, LoadError, NoMemory, StageLost, Unsupported
from shoal_common.liveness.down_text import down_texts
from shoal_common.messages.instances import InstanceSpec, InstanceState, StageSpec, StageState

_FINAL = (NoMemory.code, LoadError.code, Unsupported.code)
"""Codes of errors after which a stage is not started again."""


def instance_status(
    spec: InstanceSpec,
    stages: Iterable[StageState],
    live: Iterable[str],
    before: InstanceState | None,
    stays_because: ErrorBody | None = None,
    down_since_s: Mapping[str, float] = {},
) -> InstanceState:
    """Return the state of an instance: ready when all stages are; degraded when it was ready and a stage is not.

    A stage that was killed on OOM, or whose model does not load, is not started again, so its instance is failed even
    if it was ready before.
    `stays_because`: why an instance that should move to other nodes cannot. `down_since_s`: by node that is down.
    """
    present = set(live)
    own = _own_stages(spec, stages)
    ready = [s.rank for s in spec.stages if s.rank in own and own[s.rank].phase == "ready" and s.node in present]
    failed = [own[s.rank].error for s in spec.stages if s.rank in own and own[s.rank].phase == "failed"]
    is_final = any(error is not None and error.code in _FINAL for error in failed)
    waiting_for = _node_down_error(spec, present, stays_because, down_since_s)
    was_up = before is not None and before.epoch == spec.epoch and before.phase in ("ready", "degraded")
    if len(ready) == len(spec.stages):
        phase, error = "ready", None
    elif was_up and not is_final:
        phase, error = "degraded", next((e for e in failed if e is not None), waiting_for)
    elif failed:
        phase, error = "failed", next((e for e in failed if e is not None), None)
    else:
        phase, error = "starting", waiting_for
    return InstanceState(
        id=spec.id,
        repo=spec.repo,
        commit=spec.commit,
        phase=phase,  # type: ignore[arg-type]  # one of the four literals above
        nodes=[s.node for s in spec.stages],
        epoch=spec.epoch,
        error=error,
    )


def _node_down_error(
    spec: InstanceSpec, present: Set[str], stays_because: ErrorBody | None, down_since_s: Mapping[str, float]
) -> ErrorBody | None:
    """Return the error that names the instance's nodes that are down; `stays_because` if none is."""
    down = {node: down_since_s.get(node, 0.0) for node in sorted({s.node for s in spec.stages} - present)}
    if not down:
        return stays_because
    text = down_texts(down)
    if stays_because is None:
        return StageLost(text, down_since_s=down).body()
    message = f"{text}; the instance cannot move: {stays_because.message}"
    details = {**stays_because.details, "down_since_s": down}
    return msgspec.structs.replace(stays_because, message=message, details=details)


def has_become_degraded(before: InstanceState | None, now: InstanceState) -> bool:
    """Return whether an instance has become degraded since `before` was published."""
    was_degraded = before is not None and before.phase == "degraded" and before.epoch == now.epoch
    return now.phase == "degraded" and not was_degraded


def is_explained(missing: Iterable[tuple[StageSpec, str]], stages: Iterable[StageState]) -> bool:
    """Return whether a stage that is not ready is the cause, and not only one that has lost its neighbour."""
    linking = {(s.rank, s.node) for s in stages if s.phase == "linking"}
    return any(
        f"node {stage.node} is down" == reason or (stage.rank, stage.node) not in linking for stage, reason in missing
    )


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
