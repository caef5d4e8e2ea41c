"""The leader publishes which nodes are down, and removes every key that names a retired node, once.

This is the one exception to "every key has one writer": a retired node's keys have no writer left. A live node is
never touched; a node that comes back publishes again what its disk holds.
"""

from __future__ import annotations

import asyncio
from functools import partial

from nats.js.errors import NotFoundError

from shoal_common.bus import cluster_clock, subjects
from shoal_common.bus.cluster_lease import ClusterLease
from shoal_common.bus.keys import instance_key, node_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import earliest, reconcile_forever
from shoal_common.bus.streams import retry_while_nats_down
from shoal_common.errors import InUse
from shoal_common.liveness.compatibility import CompatibleLiveMirror
from shoal_common.logs import StructuredLogger
from shoal_common.messages.instances import InstanceSpec, StageState
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.messages.placement import Forget, NodeState
from shoal_common.names import SERVICES, check_node
from shoal_common.service import ServiceContext
from shoal_placement.catch_up import catch_up
from shoal_placement.leader.fenced_writes import FencedBucket, LeaderWrites
from shoal_placement.leader.retirement import KeysOfNode, RetirementActions, keys_by_node, plan_retirement

log = StructuredLogger("collector")

SETTLE_INTERVAL_S = 10.0
"""After NATS is back, no node is retired for this long: live nodes may not have renewed their keys yet."""
_MAX_CONCURRENT_DELETES = 32


class NodeGarbageCollector:
    """Publishes nodes that are down and retires them, while this service leads."""

    def __init__(
        self,
        context: ServiceContext,
        live: CompatibleLiveMirror,
        spec: KvMirror,
        state: KvMirror,
        retire_after_s: float,
    ) -> None:
        self._context, self._live, self._spec, self._state = context, live, spec, state
        self._retire_after_s = retire_after_s
        self._collecting = asyncio.Lock()
        self._lease: ClusterLease | None = None
        self._writes: LeaderWrites
        """Set while it leads."""

    async def run(self, lease: ClusterLease, writes: LeaderWrites) -> None:
        """Publish and retire nodes while this lease is held."""
        self._lease, self._writes = lease, writes
        loop, reconnects = asyncio.get_running_loop(), self._context.nats.reconnects
        connection, may_retire_at_s, may_publish_at_s = reconnects.count, loop.time() + SETTLE_INTERVAL_S, loop.time()

        async def collect() -> float | None:
            nonlocal connection, may_retire_at_s, may_publish_at_s
            if reconnects.count != connection:
                connection, may_retire_at_s = reconnects.count, loop.time() + SETTLE_INTERVAL_S
                may_publish_at_s = may_retire_at_s
            return await self._collect(may_retire_at_s - loop.time(), may_publish_at_s - loop.time())

        await reconcile_forever(
            "removing the keys of retired nodes",
            (self._live, self._spec, self._state),
            collect,
            # Facts in liveness records do not matter here.
            lambda: (self._live.key_changes, self._spec.changes, self._state.changes),
        )

    async def _collect(self, no_retirement_s: float, no_publishing_s: float) -> float | None:
        """Act once. For `no_retirement_s` no node is retired; for `no_publishing_s`, after an outage, none is
        published as down. Return the seconds until the next check is due."""
        named, actions = self._decide()
        if actions.publish_down:
            # The views run apart: what a node has may be seen before its liveness keys.
            await catch_up(self._context.nats, self._live)
            named, actions = self._decide()
        state, wake_s = self._writes.state, actions.wake_s
        for down in actions.publish_down:
            if no_publishing_s > 0:
                wake_s = earliest(wake_s, no_publishing_s)
                continue
            log.debug("node is down", name=down.node)
            await self._state.wait_revision(await state.put(node_key(down.node), down))
        for node in actions.clear_down:
            await state.delete(node_key(node))
            log.debug("node is live again, or no key names it", name=node)
        for retired in actions.retire:
            if no_retirement_s > 0 and not retired.forget_requested:
                wake_s = earliest(wake_s, no_retirement_s)
                continue
            reason = (
                "forgotten"
                if retired.forget_requested
                else f"down for {cluster_clock.now_s() - retired.down_since_s:.0f} s"
            )
            async with self._collecting:
                await self._retire(retired.node, reason, named.get(retired.node, KeysOfNode()))
        return wake_s

    def _decide(self) -> tuple[dict[str, KeysOfNode], RetirementActions]:
        named, now_s = self._named(), round(cluster_clock.now_s(), 3)
        return named, plan_retirement(
            named.keys(), self._live_nodes(), self._published(), now_s, self._retire_after_s
        )

    def _live_nodes(self) -> set[str]:
        # Services of another major version are ignored otherwise, but they live.
        keys = {key for key, _ in self._live.items("", LivenessRecord)} | self._live.incompatible.keys()
        return {key.partition(".")[0] for key in keys}

    def _published(self) -> dict[str, NodeState]:
        return {state.node: state for _, state in self._state.items("node.", NodeState)}

    def _named(self) -> dict[str, KeysOfNode]:
        instances = [s for _, s in self._spec.items("instance.", InstanceSpec)]
        stages = list(self._state.items("stage.", StageState))
        return keys_by_node(self._spec.keys(), self._state.keys(), instances, stages)

    async def _retire(self, node: str, reason: str, keys: KeysOfNode) -> int:
        """Remove every key that names a node. Its NodeState goes last, so that the next leader can finish (I8).

        Return the number of keys.
        """
        writes = self._writes
        for name in keys.instances:
            # The instance cannot run without the node; its other nodes stop their stages once the spec is gone.
            await self._delete(writes.spec, [instance_key(name)], node)
        await self._delete(writes.spec, keys.spec, node)
        await self._delete(writes.state, keys.state, node)
        await self._drop_commands(node)
        if not self._may_collect(node):
            return 0
        if await writes.state.delete(node_key(node)):
            log.info("node retired", name=node, reason=reason, key_count=keys.count)
            await self._context.events.emit(
                "retired", retired=node, reason=reason, key_count=keys.count, instances=sorted(keys.instances)
            )
        return keys.count

    async def _delete(self, bucket: FencedBucket, keys: list[str], node: str) -> None:
        for start in range(0, len(keys), _MAX_CONCURRENT_DELETES):
            if not self._may_collect(node):
                return
            await asyncio.gather(*(bucket.delete(key) for key in keys[start : start + _MAX_CONCURRENT_DELETES]))

    async def _drop_commands(self, node: str) -> None:
        """Delete the commands that wait for a node, and the consumers that would deliver them."""
        js = self._context.nats.js
        for service in SERVICES:
            if not self._may_collect(node):
                return
            await retry_while_nats_down(partial(js.purge_stream, "CMD", subject=subjects.all_commands(service, node)))
            try:
                await retry_while_nats_down(partial(js.delete_consumer, "CMD", subjects.consumer_name(service, node)))
            except NotFoundError:
                continue

    def _may_collect(self, node: str) -> bool:
        """Return whether this service still leads and the node is still down."""
        return self._lease is not None and self._lease.is_held and node not in self._live_nodes()

    async def forget(self, command: Forget, _: str) -> dict[str, object]:
        """Retire a node now. A node that no key names is no error (I5). Raises InUse for a live node."""
        node = check_node(command.node)
        await catch_up(self._context.nats, self._live, self._spec, self._state)
        async with self._collecting:
            if node in self._live_nodes():
                raise InUse(f"node {node} is live: stop it there with `shoal down`, then forget it")
            keys = self._named().get(node)
            if keys is None and node not in self._published():
                return {"node": node, "found": False, "key_count": 0}
            published = NodeState(node=node, down_since_s=round(cluster_clock.now_s(), 3), forget_requested=True)
            # If this leader dies in the middle, the next one goes on from here.
            await self._state.wait_revision(await self._writes.state.put(node_key(node), published))
            count = await self._retire(node, "forgotten", keys or KeysOfNode())
        if node in self._live_nodes():
            raise InUse(f"node {node} came back while it was being forgotten, and publishes again what it has")
        return {"node": node, "found": True, "key_count": count}
