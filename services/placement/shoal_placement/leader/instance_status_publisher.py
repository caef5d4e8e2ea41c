"""The leader publishes `state.instance`, and has the instances moved that cannot stay."""

from __future__ import annotations

import asyncio

from shoal_common.bus.cluster_lease import ClusterLease
from shoal_common.bus.keys import MEMBERS_KEY, instance_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import earliest, reconcile_forever
from shoal_common.logs import StructuredLogger
from shoal_common.messages.instances import InstanceSpec, InstanceState, StageState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.placement import MembersState
from shoal_common.service import ServiceContext
from shoal_placement.leader.failure_detector import FailureDetector
from shoal_placement.leader.failure_rules import nodes_present
from shoal_placement.leader.fenced_writes import LeaderWrites
from shoal_placement.leader.instance_status import (
    has_become_degraded,
    instance_status,
    is_explained,
    stages_not_ready,
)
from shoal_placement.leader.migration import Migrator
from shoal_placement.leader.node_gc import SETTLE_INTERVAL_S

log = StructuredLogger("placement")

_EXPLAIN_TIMEOUT_S = 3.0
"""A stage whose neighbour is gone shows it first: so long the failure detector has to find the node that is down."""


class InstanceStatusPublisher:
    """Publishes the state of all instances while this service leads."""

    def __init__(
        self,
        context: ServiceContext,
        mirrors: tuple[KvMirror, KvMirror, KvMirror],
        failure_detector: FailureDetector,
        migrator: Migrator,
    ) -> None:
        """`views`: live, spec, state."""
        self._context, self._failure_detector, self._migrator = context, failure_detector, migrator
        self._live, self._spec, self._state = mirrors
        self._unexplained: dict[str, float] = {}
        """Instances that have become degraded, by when to emit that at the latest."""

    async def run(self, lease: ClusterLease, writes: LeaderWrites) -> None:
        """Publish and move instances while this lease is held."""
        self._migrator.start_leading()
        self._unexplained.clear()
        loop, reconnects = asyncio.get_running_loop(), self._context.nats.reconnects
        # An outage may have made this service the leader.
        connection, settled_at_s = 0, loop.time()

        async def publish_and_move() -> float | None:
            nonlocal connection, settled_at_s
            if reconnects.count != connection:
                connection, settled_at_s = reconnects.count, loop.time() + SETTLE_INTERVAL_S
            unsettled_s = settled_at_s - loop.time()
            await self._publish(writes, settled=unsettled_s <= 0)
            stays_before = self._migrator.stay_reasons.copy()
            wake_s = await self._migrator.migrate(lease, writes)
            if self._migrator.stay_reasons != stays_before:
                await self._publish(writes, settled=unsettled_s <= 0)
            unexplained_s = min(self._unexplained.values(), default=None)
            wake_s = earliest(wake_s, None if unexplained_s is None else max(unexplained_s - loop.time(), 0.0))
            return earliest(wake_s, unsettled_s if unsettled_s > 0 else None)

        unresponsive = self._failure_detector.unresponsive
        await reconcile_forever(
            "publishing the state of instances",
            (self._live, self._spec, self._state, unresponsive),
            publish_and_move,
            # Facts in liveness records do not matter here.
            lambda: (self._live.key_changes, self._spec.changes, self._state.changes, unresponsive.changes),
        )

    async def _publish(self, writes: LeaderWrites, settled: bool) -> None:
        specs = {s.id: s for _, s in self._spec.items("instance.", InstanceSpec)}
        published = {s.id: s for _, s in self._state.items("instance.", InstanceState)}
        stages = [s for _, s in self._state.items("stage.", StageState)]
        live = {
            key.partition(".")[0] for key, _ in self._live.items("", LivenessRecord) if key.endswith(".inference")
        }
        unresponsive = self._failure_detector.unresponsive_nodes("inference")
        members = self._state.get(MEMBERS_KEY, MembersState) or MembersState()
        for name, spec in specs.items():
            before = published.get(name)
            nodes = nodes_present(live, unresponsive, before, settled)
            stays_because = self._migrator.stay_reasons.get(name)
            now = instance_status(spec, stages, nodes, before, stays_because, members.down_since_s)
            if now != before:
                await self._state.wait_revision(await writes.state.put(instance_key(name), now))
            if has_become_degraded(before, now):
                self._unexplained[name] = asyncio.get_running_loop().time() + _EXPLAIN_TIMEOUT_S
            if name in self._unexplained:
                await self._emit_degraded(spec, stages, nodes)
        self._unexplained = {name: due_s for name, due_s in self._unexplained.items() if name in specs}
        for name in published.keys() - specs.keys():
            await writes.state.delete(instance_key(name))

    async def _emit_degraded(self, spec: InstanceSpec, stages: list[StageState], present_nodes: set[str]) -> None:
        # Emitted after the state is written: a leader that dies between the two loses this event.
        missing = stages_not_ready(spec, stages, present_nodes)
        is_due = self._unexplained[spec.id] <= asyncio.get_running_loop().time()
        own = [s for s in stages if s.instance == spec.id and s.epoch == spec.epoch]
        if missing and not is_due and not is_explained(missing, own):
            return
        del self._unexplained[spec.id]
        reason = ", ".join(stage_reason for _, stage_reason in missing)
        ranks, nodes = [stage.rank for stage, _ in missing], [stage.node for stage, _ in missing]
        log.warning("instance degraded", instance=spec.id, model=spec.model, nodes=",".join(nodes), reason=reason)
        await self._context.events.emit(
            "instance_degraded", instance=spec.id, model=spec.model, ranks=ranks, nodes=nodes, reason=reason
        )
