"""What the leader says of the instances in `state.instance`, and that those move which cannot stay."""

from __future__ import annotations

import asyncio

from shoal_common.buckets import instance_key
from shoal_common.leases import Lease
from shoal_common.messages.facts import Live
from shoal_common.messages.records import InstanceSpec, InstanceState, StageState
from shoal_common.reconcile import reconcile_forever, soonest
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_placement.collector import SETTLED_S
from shoal_placement.decide import instance_state
from shoal_placement.fenced import Writes
from shoal_placement.mover import Mover
from shoal_placement.suspect import present
from shoal_placement.suspicion import Suspicion


class Instances:
    """All instances, as one leader looks after them."""

    def __init__(self, context: Context, views: tuple[View, View, View], suspicion: Suspicion, mover: Mover) -> None:
        """`views`: live, spec, state."""
        self._context, self._suspicion, self._mover = context, suspicion, mover
        self._live, self._spec, self._state = views

    async def run(self, lease: Lease, writes: Writes) -> None:
        """Look after them while this lease is held."""
        self._mover.begin()
        loop, reconnects = asyncio.get_running_loop(), self._context.nats.reconnects
        # It may be an outage that made us the leader.
        connection, settled_at_s = 0, loop.time()

        async def look() -> float | None:
            nonlocal connection, settled_at_s
            if reconnects.count != connection:
                connection, settled_at_s = reconnects.count, loop.time() + SETTLED_S
            unsettled_s = settled_at_s - loop.time()
            await self._say(writes, settled=unsettled_s <= 0)
            known = self._mover.stays.copy()
            wake_s = await self._mover.look(lease, writes)
            if self._mover.stays != known:
                await self._say(writes, settled=unsettled_s <= 0)
            return soonest(wake_s, unsettled_s if unsettled_s > 0 else None)

        silent = self._suspicion.silent
        await reconcile_forever(
            "looking after instances",
            (self._live, self._spec, self._state, silent),
            look,
            # What the living say of themselves is nothing to go by here.
            lambda: (self._live.comings, self._spec.changes, self._state.changes, silent.changes),
        )

    async def _say(self, writes: Writes, settled: bool) -> None:
        specs = {s.id: s for _, s in self._spec.items("instance.", InstanceSpec)}
        told = {s.id: s for _, s in self._state.items("instance.", InstanceState)}
        stages = [s for _, s in self._state.items("stage.", StageState)]
        live = {key.partition(".")[0] for key, _ in self._live.items("", Live) if key.endswith(".inference")}
        silent = self._suspicion.nodes("inference")
        for name, spec in specs.items():
            here = present(live, silent, told.get(name), settled)
            now = instance_state(spec, stages, here, told.get(name), self._mover.stays.get(name))
            if now != told.get(name):
                await self._state.reached(await writes.state.put(instance_key(name), now))
        for name in told.keys() - specs.keys():
            await writes.state.delete(instance_key(name))
