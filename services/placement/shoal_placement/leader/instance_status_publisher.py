"""The leader publishes `state.instance`, and has the instances moved that cannot stay."""

from __future__ import annotations

import asyncio

from shoal_common.bus.cluster_lease import Lease
from shoal_common.bus.keys import instance_key
from shoal_common.bus.kv_mirror import View
from shoal_common.bus.reconcile import reconcile_forever, soonest
from shoal_common.logs import Log
from shoal_common.messages.instances import InstanceSpec, InstanceState, StageState
from shoal_common.messages.liveness import Live
from shoal_common.service import Context
from shoal_placement.leader.failure_detector import Suspicion
from shoal_placement.leader.failure_rules import present
from shoal_placement.leader.fenced_writes import Writes
from shoal_placement.leader.instance_status import has_degraded, instance_state, stages_not_ready
from shoal_placement.leader.migration import Mover
from shoal_placement.leader.node_gc import SETTLED_S

log = Log("placement")


class Instances:
    """Publishes the state of all instances while this service leads."""

    def __init__(self, context: Context, views: tuple[View, View, View], suspicion: Suspicion, mover: Mover) -> None:
        """`views`: live, spec, state."""
        self._context, self._suspicion, self._mover = context, suspicion, mover
        self._live, self._spec, self._state = views

    async def run(self, lease: Lease, writes: Writes) -> None:
        """Publish and move instances while this lease is held."""
        self._mover.begin()
        loop, reconnects = asyncio.get_running_loop(), self._context.nats.reconnects
        # An outage may have made this service the leader.
        connection, settled_at_s = 0, loop.time()

        async def publish_and_move() -> float | None:
            nonlocal connection, settled_at_s
            if reconnects.count != connection:
                connection, settled_at_s = reconnects.count, loop.time() + SETTLED_S
            unsettled_s = settled_at_s - loop.time()
            await self._publish(writes, settled=unsettled_s <= 0)
            stays_before = self._mover.stays.copy()
            wake_s = await self._mover.look(lease, writes)
            if self._mover.stays != stays_before:
                await self._publish(writes, settled=unsettled_s <= 0)
            return soonest(wake_s, unsettled_s if unsettled_s > 0 else None)

        unresponsive = self._suspicion.silent
        await reconcile_forever(
            "publishing the state of instances",
            (self._live, self._spec, self._state, unresponsive),
            publish_and_move,
            # Facts in liveness records do not matter here.
            lambda: (self._live.comings, self._spec.changes, self._state.changes, unresponsive.changes),
        )

    async def _publish(self, writes: Writes, settled: bool) -> None:
        specs = {s.id: s for _, s in self._spec.items("instance.", InstanceSpec)}
        published = {s.id: s for _, s in self._state.items("instance.", InstanceState)}
        stages = [s for _, s in self._state.items("stage.", StageState)]
        live = {key.partition(".")[0] for key, _ in self._live.items("", Live) if key.endswith(".inference")}
        unresponsive = self._suspicion.nodes("inference")
        for name, spec in specs.items():
            before = published.get(name)
            nodes = present(live, unresponsive, before, settled)
            now = instance_state(spec, stages, nodes, before, self._mover.stays.get(name))
            if now != before:
                await self._state.reached(await writes.state.put(instance_key(name), now))
            if has_degraded(before, now):
                await self._emit_degraded(spec, stages, nodes)
        for name in published.keys() - specs.keys():
            await writes.state.delete(instance_key(name))

    async def _emit_degraded(self, spec: InstanceSpec, stages: list[StageState], present_nodes: set[str]) -> None:
        # Emitted after the state is written: a leader that dies between the two loses this event.
        missing = stages_not_ready(spec, stages, present_nodes)
        reason = ", ".join(why for _, why in missing)
        ranks, nodes = [stage.rank for stage, _ in missing], [stage.node for stage, _ in missing]
        log.warning("instance degraded", instance=spec.id, model=spec.model, nodes=",".join(nodes), reason=reason)
        await self._context.events.tell(
            "instance_degraded", instance=spec.id, model=spec.model, ranks=ranks, nodes=nodes, reason=reason
        )
