"""The leader replans an instance that has lost a node, or has to leave a drained one, and moves it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from shoal_common.bus.cluster_lease import ClusterLease
from shoal_common.bus.keys import instance_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import earliest
from shoal_common.errors import ErrorBody, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.instances import InstanceSpec
from shoal_common.messages.placement import NodeSpec
from shoal_common.service import ServiceContext
from shoal_placement.catch_up import catch_up
from shoal_placement.leader.fenced_writes import LeaderWrites
from shoal_placement.leader.migration_plan import LeavingInstance, MigrationPlan, plan_migrations
from shoal_placement.planning.cluster_facts import ClusterFacts
from shoal_placement.planning.rebalance import replan

log = StructuredLogger("mover")

_NO_ROOM_RETRY_INTERVAL_S = 30.0
"""Until an instance that fits nowhere is tried again: nothing is published when memory becomes free."""


class Migrator:
    """Moves instances that cannot stay on their nodes, while this service leads."""

    def __init__(
        self,
        context: ServiceContext,
        mirrors: tuple[KvMirror, KvMirror, KvMirror],
        inference_nodes: Callable[[], set[str]],
        cluster_facts: Callable[[], ClusterFacts],
        lock: asyncio.Lock,
        replace_after_s: float,
    ) -> None:
        """`views`: live, spec, state. `working` returns the nodes that can run stages. `section` is held while memory
        is allocated."""
        self._context, self._section = context, lock
        self._working, self._cluster_facts = inference_nodes, cluster_facts
        self._live, self._spec, self._state = mirrors
        self._replace_after_s = replace_after_s
        self._down_since_s: dict[str, float] = {}
        self._connection = context.nats.reconnects.count
        self.stay_reasons: dict[str, ErrorBody] = {}
        """Why an instance that should move cannot, by instance."""

    def start_leading(self) -> None:
        """Start to lead: nodes count as down from now on, since a new leader does not know how long they were."""
        self._down_since_s.clear()
        self._connection = self._context.nats.reconnects.count
        self.stay_reasons = {}

    async def migrate(self, lease: ClusterLease, writes: LeaderWrites) -> float | None:
        """Move what has to move while the lease is held. Return the seconds until the next check is due."""
        if self._context.nats.reconnects.count != self._connection:
            # During the outage no node could renew its liveness: start counting again.
            self._connection = self._context.nats.reconnects.count
            self._down_since_s.clear()
        plan = self._decide()
        if plan.leaving:
            async with self._section:
                # The mirrors may only be late.
                await catch_up(self._context.nats, self._live, self._spec, self._state)
                plan = self._decide()
                for leaving in plan.leaving:
                    if not lease.is_held:
                        return None
                    await self._move(leaving, writes)
        self.stay_reasons = {i: e for i, e in self.stay_reasons.items() if i in {m.spec.id for m in plan.leaving}}
        return earliest(plan.wake_s, _NO_ROOM_RETRY_INTERVAL_S if self.stay_reasons else None)

    def _decide(self) -> MigrationPlan:
        specs, now_s = [s for _, s in self._spec.items("instance.", InstanceSpec)], monotonic()
        down = {stage.node for spec in specs for stage in spec.stages} - self._working()
        self._down_since_s = {node: self._down_since_s.get(node, now_s) for node in down}
        down_s = {node: now_s - since_s for node, since_s in self._down_since_s.items()}
        drained = {s.node for _, s in self._spec.items("node.", NodeSpec)}
        return plan_migrations(specs, down_s, drained, self._replace_after_s)

    async def _move(self, leaving: LeavingInstance, writes: LeaderWrites) -> None:
        spec = leaving.spec
        try:
            replanned = await asyncio.to_thread(replan, spec, self._cluster_facts())
        except ShoalError as e:
            if spec.id not in self.stay_reasons:
                log.warning("instance cannot move", instance=spec.id, because=leaving.reason, reason=e.message)
            self.stay_reasons[spec.id] = e.body()
            return
        if self._spec.get(instance_key(spec.id), InstanceSpec) != spec:
            return  # stopped meanwhile
        await self.publish_layout(replanned, leaving.reason, writes)
        self.stay_reasons.pop(spec.id, None)

    async def publish_layout(self, replanned: InstanceSpec, reason: str, writes: LeaderWrites) -> None:
        """Publish the new layout of an instance, and emit `moved`. The caller holds the section."""
        await self._spec.wait_revision(await writes.spec.put(instance_key(replanned.id), replanned))
        nodes = [stage.node for stage in replanned.stages]
        log.info(
            "instance moved", instance=replanned.id, because=reason, nodes=",".join(nodes), epoch=replanned.epoch
        )
        await self._context.events.emit("moved", instance=replanned.id, because=reason, nodes=nodes)
