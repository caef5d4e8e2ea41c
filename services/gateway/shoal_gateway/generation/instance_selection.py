"""Select the instance that answers a request, and check that it still can. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from shoal_common.errors import BadName, NotFound, ShoalError, StageLost, Unavailable, from_body
from shoal_common.liveness.down_text import down_text
from shoal_common.messages.instances import InstanceSpec, StageState
from shoal_common.names import ModelRef
from shoal_gateway.cluster.openai_models import names_model, resolve_commit
from shoal_gateway.cluster.snapshot import ClusterSnapshot


def lost_stage_reason(
    spec: InstanceSpec,
    stages: Mapping[int, StageState],
    live_nodes: Collection[str],
    down_since_s: Mapping[str, float] = {},
) -> str | None:
    """Return why the first stage that cannot answer cannot; None when all can.

    A node that is gone comes first: its neighbours lose their links and are not the cause. `down_since_s`: by node
    that is down.
    """
    down = [s for s in spec.stages if s.node not in live_nodes]
    if down:
        stage_name, since_s = f"stage {down[0].rank} on node {down[0].node}", down_since_s.get(down[0].node)
        if since_s is None:
            return f"{stage_name} is down: its inference service does not answer"
        return f"{stage_name} is down: {down_text(down[0].node, since_s)}"
    for planned in spec.stages:
        stage = stages.get(planned.rank)
        stage_name = f"stage {planned.rank} on node {planned.node}"
        if stage is None:
            return f"{stage_name} is not running"
        if stage.epoch != spec.epoch:
            return f"{stage_name} runs another layout (epoch {stage.epoch}, not {spec.epoch})"
        if stage.phase != "ready":
            return f"{stage_name} is {stage.phase}" + (f": {stage.error.message}" if stage.error else "")
    return None


def select_instance(snapshot: ClusterSnapshot, name: str, in_flight: Mapping[str, int]) -> InstanceSpec:
    """Return the ready instance with the fewest requests in flight that `name` names.

    `name` is an instance's id, `org/name` or `org/name@revision`. Raises NotFound when no instance has that name,
    Unavailable or StageLost while none of them can answer.
    """
    candidates = _candidates(snapshot, name)
    live_nodes = snapshot.live_nodes("inference")
    reasons: list[ShoalError] = []
    usable: list[InstanceSpec] = []
    for spec in candidates:
        reason = _unusable_reason(snapshot, spec, live_nodes)
        if reason is None:
            usable.append(spec)
        else:
            reasons.append(reason)
    if usable:
        return min(usable, key=lambda s: (in_flight.get(s.id, 0), s.created_at_s, s.id))
    raise reasons[0]


def _candidates(snapshot: ClusterSnapshot, name: str) -> list[InstanceSpec]:
    if name in snapshot.specs:
        return [snapshot.specs[name]]
    running = sorted({s.repo for s in snapshot.specs.values()})
    hint = f"running: {', '.join(running)}" if running else "nothing is running"
    try:
        ref = ModelRef.parse(name)
    except BadName:
        raise NotFound(
            f"no model or instance is named {name[:200]!r}; {hint}", param="model", running=running
        ) from None
    commit = resolve_commit(snapshot.models, ref)
    matching = [
        s
        for s in snapshot.specs.values()
        if names_model(s.repo, s.commit, ref) or (s.repo == ref.repo and s.commit == commit)
    ]
    if not matching:
        raise NotFound(
            f"{ref} is not running; start it with `shoal run {ref}` ({hint})", param="model", running=running
        )
    return matching


def _unusable_reason(snapshot: ClusterSnapshot, spec: InstanceSpec, live_nodes: Collection[str]) -> ShoalError | None:
    state = snapshot.instances.get(spec.id)
    phase = state.phase if state else "starting"
    lost = lost_stage_reason(spec, snapshot.stages.get(spec.id, {}), live_nodes, snapshot.down_since_s)
    if phase == "ready" and lost is None:
        return None
    if lost is not None and (phase == "ready" or any(s.node not in live_nodes for s in spec.stages)):
        return StageLost(f"instance {spec.id} of {spec.repo} cannot answer: {lost}; try again in a moment")
    if phase == "failed":
        reason = from_body(state.error).message if state and state.error else "see `shoal logs`"
        return Unavailable(
            f"instance {spec.id} of {spec.repo} has failed: {reason}; "
            f"restart it with `shoal stop {spec.id}` and `shoal run {spec.repo}`"
        )
    reason = f" ({lost})" if lost is not None else ""
    return Unavailable(
        f"instance {spec.id} of {spec.repo} is {phase}{reason}; try again in a moment, or see `shoal ps`"
    )
