"""The leader emits which nodes joined, were lost or returned: `membership.py` decides."""

from __future__ import annotations

import asyncio

from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import MEMBERS_KEY
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import reconcile_forever
from shoal_common.liveness.compatibility import CompatibleLiveMirror
from shoal_common.logs import StructuredLogger
from shoal_common.messages.placement import MembersState
from shoal_common.service import ServiceContext
from shoal_placement.catch_up import catch_up
from shoal_placement.leader.fenced_writes import LeaderWrites
from shoal_placement.leader.membership import MemberChanges, answering_nodes, compare_members
from shoal_placement.leader.node_gc import SETTLE_INTERVAL_S
from shoal_placement.leader.retirement import keys_by_node

log = StructuredLogger("membership")


class MembershipPublisher:
    """Publishes the members of the cluster while this service leads."""

    def __init__(
        self, context: ServiceContext, live: CompatibleLiveMirror, state: KvMirror, unresponsive: KvMirror
    ) -> None:
        """`unresponsive`: the keys of `live` whose services do not answer."""
        self._context, self._live, self._state, self._unresponsive = context, live, state, unresponsive

    async def run(self, writes: LeaderWrites) -> None:
        """Publish each change until cancelled."""
        loop, reconnects = asyncio.get_running_loop(), self._context.nats.reconnects
        # An outage may have made this service the leader.
        connection, settled_at_s = 0, loop.time()

        async def publish_changes() -> float | None:
            nonlocal connection, settled_at_s
            if reconnects.count != connection:
                connection, settled_at_s = reconnects.count, loop.time() + SETTLE_INTERVAL_S
            unsettled_s = settled_at_s - loop.time()
            await self._publish(writes, settled=unsettled_s <= 0)
            return unsettled_s if unsettled_s > 0 else None

        await reconcile_forever(
            "publishing which nodes are members",
            (self._live, self._state, self._unresponsive),
            publish_changes,
            # Facts in liveness records do not matter here.
            lambda: (self._live.key_changes, self._state.key_changes, self._unresponsive.key_changes),
        )

    async def _publish(self, writes: LeaderWrites, settled: bool) -> None:
        changes = self._changes(settled)
        if changes.lost:
            # The views run apart: the record may be seen before the liveness keys of its nodes.
            await catch_up(self._context.nats, self._live)
            changes = self._changes(settled)
        if changes.members == self._members():
            return
        await self._state.wait_revision(await writes.state.put(MEMBERS_KEY, changes.members))
        await self._emit(changes)

    def _changes(self, settled: bool) -> MemberChanges:
        members = self._members()
        live = answering_nodes(self._live_keys(), set(self._unresponsive.keys()))
        if not settled:  # right after an outage a missing key proves nothing
            live |= {node for node, since_s in members.lost_since_s.items() if since_s == 0}
        named = keys_by_node((), self._state.keys(), (), ()).keys()
        return compare_members(members, named, live, round(cluster_clock.now_s(), 3))

    def _members(self) -> MembersState:
        return self._state.get(MEMBERS_KEY, MembersState) or MembersState()

    def _live_keys(self) -> set[str]:
        # Services of another major version are ignored otherwise, but they live.
        return {*self._live.keys(), *self._live.incompatible}

    async def _emit(self, changes: MemberChanges) -> None:
        # A leader that dies between the write and this loses these events.
        events = self._context.events
        for node in changes.joined:
            log.info("node joined", name=node)
            await events.emit("node_joined", node=node)
        have_keys = answering_nodes(self._live_keys(), set())
        for node in changes.lost:
            reason = "it does not answer" if node in have_keys else "its liveness keys expired or were removed"
            since_s = changes.members.lost_since_s.get(node, cluster_clock.now_s())
            log.warning("node lost", name=node, reason=reason)
            await events.emit("node_lost", node=node, since_s=round(since_s, 3), reason=reason)
        for node in changes.returned:
            log.info("node returned", name=node)
            await events.emit("node_returned", node=node)
