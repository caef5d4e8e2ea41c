"""The leader's collector: notes which nodes are silent, and removes what names those that are retired, once.

The one exception to "every key has one writer": a retired node's keys have no writer left. A node that is live is
never touched; one that comes back says again what its disk holds.
"""

from __future__ import annotations

import asyncio

from nats.js.errors import NotFoundError

from shoal_common import clock, subjects
from shoal_common.buckets import instance_key, node_key, patiently
from shoal_common.company import CompanyView
from shoal_common.errors import InUse
from shoal_common.leases import Lease
from shoal_common.logs import Log
from shoal_common.messages.commands import Forget
from shoal_common.messages.facts import Live
from shoal_common.messages.records import InstanceSpec, NodeState, StageState
from shoal_common.names import check_node
from shoal_common.reconcile import reconcile_forever, soonest
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_placement.current import catch_up
from shoal_placement.fenced import Fenced, Writes
from shoal_placement.retire import Actions, Named, named_by, reconcile

log = Log("collector")

SETTLED_S = 10.0
"""So long after NATS has come back nobody is retired for silence: the living may have had no chance to speak yet."""
_AT_ONCE = 32


class Collector:
    """What one leader does about nodes that are gone, as long as it holds its lease."""

    def __init__(self, context: Context, live: CompanyView, spec: View, state: View, retire_after_s: float) -> None:
        self._context, self._live, self._spec, self._state = context, live, spec, state
        self._retire_after_s = retire_after_s
        self._collecting = asyncio.Lock()
        self._lease: Lease | None = None
        self._writes: Writes
        """While it leads."""

    async def run(self, lease: Lease, writes: Writes) -> None:
        """Collect while this lease is held."""
        self._lease, self._writes = lease, writes
        loop, reconnects = asyncio.get_running_loop(), self._context.nats.reconnects
        connection, settled_at_s, noted_at_s = reconnects.count, loop.time() + SETTLED_S, loop.time()

        async def look() -> float | None:
            nonlocal connection, settled_at_s, noted_at_s
            if reconnects.count != connection:
                connection, settled_at_s = reconnects.count, loop.time() + SETTLED_S
                noted_at_s = settled_at_s
            return await self._look(settled_at_s - loop.time(), noted_at_s - loop.time())

        await reconcile_forever(
            "collecting what retired nodes leave behind",
            (self._live, self._spec, self._state),
            look,
            # What the living say of themselves is nothing to go by here.
            lambda: (self._live.comings, self._spec.changes, self._state.changes),
        )

    async def _look(self, unsettled_s: float, excused_s: float) -> float | None:
        """`unsettled_s`: for so long nobody is retired; `excused_s`: nor found silent, right after an outage."""
        named, actions = self._decide()
        if actions.silent:
            # Views run apart: what a node has may be seen before it is seen to live.
            await catch_up(self._context.nats, self._live)
            named, actions = self._decide()
        state, wake_s = self._writes.state, actions.wake_s
        for silent in actions.silent:
            if excused_s > 0:
                wake_s = soonest(wake_s, excused_s)
                continue
            log.info("a node is silent", silent=silent.node)
            await self._state.reached(await state.put(node_key(silent.node), silent))
        for node in actions.clear:
            await state.delete(node_key(node))
            log.info("a node is back, or nothing names it any more", was_silent=node)
        for retired in actions.retire:
            if unsettled_s > 0 and not retired.forgotten:
                wake_s = soonest(wake_s, unsettled_s)
                continue
            why = "forgotten" if retired.forgotten else f"silent for {clock.now_s() - retired.silent_since_s:.0f} s"
            async with self._collecting:
                await self._retire(retired.node, why, named.get(retired.node, Named()))
        return wake_s

    def _decide(self) -> tuple[dict[str, Named], Actions]:
        named, now_s = self._named(), round(clock.now_s(), 3)
        return named, reconcile(named.keys(), self._live_nodes(), self._told(), now_s, self._retire_after_s)

    def _live_nodes(self) -> set[str]:
        # One of another version is ignored, and lives.
        here = {key for key, _ in self._live.items("", Live)} | self._live.others.keys()
        return {key.partition(".")[0] for key in here}

    def _told(self) -> dict[str, NodeState]:
        return {state.node: state for _, state in self._state.items("node.", NodeState)}

    def _named(self) -> dict[str, Named]:
        instances = [s for _, s in self._spec.items("instance.", InstanceSpec)]
        stages = list(self._state.items("stage.", StageState))
        return named_by(self._spec.keys(), self._state.keys(), instances, stages)

    async def _retire(self, node: str, why: str, found: Named) -> int:
        """Remove all that names a node; its NodeState last, so that the next leader goes on where this one ends."""
        writes = self._writes
        for name in found.instances:
            # What was to run there cannot: its other nodes take their stages down when this is gone.
            await self._delete(writes.spec, [instance_key(name)], node)
        await self._delete(writes.spec, found.spec, node)
        await self._delete(writes.state, found.state, node)
        await self._drop_commands(node)
        if not self._may_collect(node):
            return 0
        if await writes.state.delete(node_key(node)):
            log.info("retired", retired=node, why=why, keys=found.count)
            await self._context.events.tell(
                "retired", retired=node, why=why, key_count=found.count, instances=sorted(found.instances)
            )
        return found.count

    async def _delete(self, bucket: Fenced, keys: list[str], node: str) -> None:
        for at in range(0, len(keys), _AT_ONCE):
            if not self._may_collect(node):
                return
            await asyncio.gather(*(bucket.delete(key) for key in keys[at : at + _AT_ONCE]))

    async def _drop_commands(self, node: str) -> None:
        """Commands that wait for the node, and the consumers that would have brought them."""
        js = self._context.nats.js
        for service in subjects.SERVICES:
            if not self._may_collect(node):
                return
            await patiently(lambda s=service: js.purge_stream("CMD", subject=subjects.commands_of(s, node)))  # type: ignore[misc]  # a default binds it
            try:
                await patiently(lambda s=service: js.delete_consumer("CMD", subjects.durable(s, node)))  # type: ignore[misc]  # the same
            except NotFoundError:
                continue

    def _may_collect(self, node: str) -> bool:
        """Whether we lead still, and the node is still away."""
        return self._lease is not None and self._lease.held and node not in self._live_nodes()

    async def forget(self, command: Forget, _: str) -> dict[str, object]:
        """Retire a node now. One that nothing names is no error (I5); one that is live is not forgotten."""
        node = check_node(command.node)
        await catch_up(self._context.nats, self._live, self._spec, self._state)
        async with self._collecting:
            if node in self._live_nodes():
                raise InUse(f"node {node} is live: end it there with `shoal down`, then forget it")
            found = self._named().get(node)
            if found is None and node not in self._told():
                return {"node": node, "found": False, "key_count": 0}
            told = NodeState(node=node, silent_since_s=round(clock.now_s(), 3), forgotten=True)
            # Should this leader end in the middle, the next one goes on.
            await self._state.reached(await self._writes.state.put(node_key(node), told))
            count = await self._retire(node, "forgotten", found or Named())
        if node in self._live_nodes():
            raise InUse(f"node {node} came back while it was being forgotten; it says again what it has")
        return {"node": node, "found": True, "key_count": count}
