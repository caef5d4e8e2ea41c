"""Which stages this node has to run, and how a stage's failures are called. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from shoal_common import errors
from shoal_common.interfaces import Interface
from shoal_common.messages.records import InstanceSpec, StageSpec, StageState
from shoal_common.reach import order


class Assignment(msgspec.Struct, frozen=True):
    """One stage that this node has to run."""

    spec: InstanceSpec
    stage: StageSpec

    @property
    def key(self) -> tuple[str, int, int]:
        """Instance, epoch and rank: another epoch is another process."""
        return (self.spec.id, self.spec.epoch, self.stage.rank)


class Changes(msgspec.Struct, frozen=True):
    """What to do so that what runs is what is wanted."""

    start: list[Assignment]
    stop: list[tuple[str, int, int]]


def assignments(specs: Iterable[InstanceSpec], node: str) -> dict[tuple[str, int, int], Assignment]:
    """The stages that the cluster wants of a node."""
    found = [Assignment(spec, stage) for spec in specs for stage in spec.stages if stage.node == node]
    return {a.key: a for a in found}


def reconcile(wanted: Mapping[tuple[str, int, int], Assignment], running: Iterable[tuple[str, int, int]]) -> Changes:
    """Start what is wanted and does not run; stop what runs and is not wanted."""
    now = set(running)
    return Changes(
        start=[wanted[key] for key in sorted(wanted.keys() - now)],
        stop=sorted(now - wanted.keys()),
    )


def leftovers(states: Iterable[StageState], wanted: Iterable[Assignment], node: str) -> list[tuple[str, int]]:
    """Stages of this node that are told of and not wanted any more: an earlier process left them."""
    keep = {(a.spec.id, a.stage.rank) for a in wanted}
    return sorted((s.instance, s.rank) for s in states if s.node == node and (s.instance, s.rank) not in keep)


def next_address(spec: InstanceSpec, rank: int, states: Iterable[StageState], mine: Sequence[Interface] = ()) -> str:
    """Where to reach the stage after `rank` from a machine with these interfaces, "" while it does not listen."""
    after = (rank + 1) % len(spec.stages)
    for state in states:
        if (state.instance, state.rank, state.epoch) == (spec.id, after, spec.epoch):
            links = order(state.links, mine) if state.address else []
            return links[0].address if links else state.address
    return ""


_BY_STAGE_CODE: dict[str, type[errors.ShoalError]] = {
    "prompt_too_long": errors.PromptTooLong,
    "bad_input": errors.BadInput,
    "stage_lost": errors.StageLost,
    "stage_timeout": errors.Expired,
    "compute_stuck": errors.StageLost,
    "busy": errors.Busy,
    "unsupported_architecture": errors.Unsupported,
}


def stage_error(code: str, message: str) -> errors.ShoalError:
    """What a stage process calls by a code, as one of our errors."""
    return _BY_STAGE_CODE.get(code, errors.Failed)(message)


def respawn_delay_s(deaths: int) -> float:
    """Seconds before a stage process is started again after its n-th death in a row: 0.2, 0.4, … at most 15."""
    return float(min(0.2 * 2 ** min(max(deaths - 1, 0), 10), 15.0))
