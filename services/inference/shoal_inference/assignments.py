"""Decide which stages this node runs. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from shoal_common.errors import Unavailable
from shoal_common.host.addresses import sort_by_preference
from shoal_common.host.interfaces import Interface
from shoal_common.messages.instances import InstanceSpec, StageSpec, StageState
from shoal_common.messages.liveness import NodeAddress


class Assignment(msgspec.Struct, frozen=True):
    """One stage that this node must run."""

    spec: InstanceSpec
    stage: StageSpec

    @property
    def key(self) -> tuple[str, int, int]:
        """Instance, epoch and rank. A new epoch needs a new process."""
        return (self.spec.id, self.spec.epoch, self.stage.rank)


class StageChanges(msgspec.Struct, frozen=True):
    """The stages to start and to stop."""

    start: list[Assignment]
    stop: list[tuple[str, int, int]]


def assignments(specs: Iterable[InstanceSpec], node: str) -> dict[tuple[str, int, int], Assignment]:
    """Return the stages that the specs assign to a node, by key."""
    own = [Assignment(spec, stage) for spec in specs for stage in spec.stages if stage.node == node]
    return {a.key: a for a in own}


def reconcile(
    wanted: Mapping[tuple[str, int, int], Assignment], running: Iterable[tuple[str, int, int]]
) -> StageChanges:
    """Return the difference between the wanted and the running stages."""
    running_keys = set(running)
    return StageChanges(
        start=[wanted[key] for key in sorted(wanted.keys() - running_keys)],
        stop=sorted(running_keys - wanted.keys()),
    )


def stale_stages(states: Iterable[StageState], wanted: Iterable[Assignment], node: str) -> list[tuple[str, int]]:
    """Return this node's published stages that are no longer wanted: an earlier process left their keys."""
    keep = {(a.spec.id, a.stage.rank) for a in wanted}
    return sorted((s.instance, s.rank) for s in states if s.node == node and (s.instance, s.rank) not in keep)


def successor_link(
    spec: InstanceSpec,
    rank: int,
    states: Iterable[StageState],
    is_usable: Callable[[NodeAddress], bool],
    own_interfaces: Sequence[Interface] = (),
) -> NodeAddress | None:
    """Return the best usable address of the stage after `rank` as seen from these interfaces.

    None while it has none. Raises Unavailable if none of its addresses may be used."""
    next_rank = (rank + 1) % len(spec.stages)
    for state in states:
        if (state.instance, state.rank, state.epoch) == (spec.id, next_rank, spec.epoch) and state.address:
            links = sort_by_preference(state.links, own_interfaces) or [NodeAddress(address=state.address)]
            if (link := next(filter(is_usable, links), None)) is None:
                raise _no_usable_link(next_rank, state.node, links)
            return link
    return None


def _no_usable_link(rank: int, node: str, links: Sequence[NodeAddress]) -> Unavailable:
    addresses = ", ".join(link.address for link in links)
    if any(link.tls for link in links):
        reason = "they speak TLS, and this node is in no cluster: `shoal join` it with a code of `shoal invite`"
    else:
        reason = f"they do not encrypt, as a cluster's nodes do: join node {node} with a code of `shoal invite`"
    return Unavailable(f"no address of stage {rank} on node {node} can be used ({addresses}): {reason}")
