"""The leader's mover: an instance that has lost a node, or is to leave one, is placed anew on others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from shoal_common.buckets import instance_key
from shoal_common.errors import ErrorBody, ShoalError
from shoal_common.leases import Lease
from shoal_common.logs import Log
from shoal_common.messages.records import InstanceSpec, NodeSpec
from shoal_common.reconcile import soonest
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_placement.anew import placed_anew
from shoal_placement.current import catch_up
from shoal_placement.decide import World
from shoal_placement.fenced import Writes
from shoal_placement.moves import Leaving, Moves, moves

log = Log("mover")

_LOOK_AGAIN_S = 30.0
"""For an instance that found no room: memory is freed without a word."""


class Mover:
    """What one leader does about instances that cannot stay where they are."""

    def __init__(
        self,
        context: Context,
        views: tuple[View, View, View],
        working: Callable[[], set[str]],
        world: Callable[[], World],
        section: asyncio.Lock,
        replace_after_s: float,
    ) -> None:
        """`views`: live, spec, state. `working`: nodes that run stages. `section`: held to give memory away."""
        self._context, self._section = context, section
        self._working, self._world = working, world
        self._live, self._spec, self._state = views
        self._replace_after_s = replace_after_s
        self._gone_since_s: dict[str, float] = {}
        self._connection = context.nats.reconnects.count
        self.stays: dict[str, ErrorBody] = {}
        """Why an instance that should move does not, by instance."""

    def begin(self) -> None:
        """A new leader knows of nobody for how long it was away, but from now on."""
        self._gone_since_s.clear()
        self._connection = self._context.nats.reconnects.count
        self.stays = {}

    async def look(self, lease: Lease, writes: Writes) -> float | None:
        """Move what has to move, while the lease is held. Returns the seconds until another look is due."""
        if self._context.nats.reconnects.count != self._connection:
            # While NATS was away nobody could say that they live: they get their time anew.
            self._connection = self._context.nats.reconnects.count
            self._gone_since_s.clear()
        now = self._decide()
        if now.leaving:
            async with self._section:
                # What makes somebody move may be that our views are late.
                await catch_up(self._context.nats, self._live, self._spec, self._state)
                now = self._decide()
                for leaving in now.leaving:
                    if not lease.held:
                        return None
                    await self._move(leaving, writes)
        self.stays = {i: e for i, e in self.stays.items() if i in {m.spec.id for m in now.leaving}}
        return soonest(now.wake_s, _LOOK_AGAIN_S if self.stays else None)

    def _decide(self) -> Moves:
        specs, now_s = [s for _, s in self._spec.items("instance.", InstanceSpec)], monotonic()
        gone = {stage.node for spec in specs for stage in spec.stages} - self._working()
        self._gone_since_s = {node: self._gone_since_s.get(node, now_s) for node in gone}
        gone_s = {node: now_s - since_s for node, since_s in self._gone_since_s.items()}
        drained = {s.node for _, s in self._spec.items("node.", NodeSpec)}
        return moves(specs, gone_s, drained, self._replace_after_s)

    async def _move(self, leaving: Leaving, writes: Writes) -> None:
        spec = leaving.spec
        try:
            fresh = await asyncio.to_thread(placed_anew, spec, self._world())
        except ShoalError as e:
            if spec.id not in self.stays:
                log.warning("cannot move", instance=spec.id, because=leaving.why, why=e.message)
            self.stays[spec.id] = e.body()
            return
        if self._spec.get(instance_key(spec.id), InstanceSpec) != spec:
            return  # stopped meanwhile
        await self.settle(fresh, leaving.why, writes)
        self.stays.pop(spec.id, None)

    async def settle(self, fresh: InstanceSpec, because: str, writes: Writes) -> None:
        """Have an instance stand so from now on, and tell. Under the section."""
        await self._spec.reached(await writes.spec.put(instance_key(fresh.id), fresh))
        nodes = [stage.node for stage in fresh.stages]
        log.info("moved", instance=fresh.id, because=because, nodes=",".join(nodes), epoch=fresh.epoch)
        await self._context.events.tell("moved", instance=fresh.id, because=because, nodes=nodes)
