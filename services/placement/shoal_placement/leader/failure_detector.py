"""The leader pings nodes to which somebody has lost a connection: `failure_rules.py` decides who is down."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from shoal_common.bus import subjects
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.errors import BadName, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.envelope import Empty
from shoal_common.names import check_node
from shoal_common.rpc.request_reply import PING
from shoal_common.service import ServiceContext
from shoal_placement.leader.failure_rules import services_to_ping, unresponsive_keys

log = StructuredLogger("placement")

PING_DEADLINE_S = 1.0
_MAX_CONCURRENT_NODES = 64


class FailureDetector:
    """Keeps the keys of `live` whose services do not answer."""

    def __init__(self, context: ServiceContext, live: KvMirror) -> None:
        self._context, self._live = context, live
        self.unresponsive = KvMirror("silent")
        """Keys of `live`; the values are empty."""
        self._reported: set[str] = set()

    def unresponsive_nodes(self, service: str) -> set[str]:
        """Return the nodes whose service does not answer."""
        keys = self.unresponsive.keys()
        return {key.partition(".")[0] for key in keys if key.endswith(f".{service}")}

    async def run(self) -> None:
        """Listen for reports of broken connections and ping those nodes. When cancelled, forget all suspicion."""
        async with asyncio.TaskGroup() as tasks:
            checking: set[str] = set()

            async def check(node: str) -> None:
                try:
                    await self._check_until_clear(node)
                finally:
                    checking.discard(node)

            async def on_report(message: Msg) -> None:
                if subjects.is_from_consumer(message.reply):
                    return
                with suppress(BadName):
                    node = check_node(message.subject.rpartition(".")[2])
                    if node in checking or len(checking) < _MAX_CONCURRENT_NODES:
                        self._reported.add(node)
                    if node not in checking and node in self._reported:
                        checking.add(node)
                        tasks.create_task(check(node))

            subscription = await self._context.nats.client.subscribe(subjects.peer_lost("*"), cb=on_report)
            try:
                await asyncio.Event().wait()
            finally:
                self.unresponsive.replace({})
                self._reported.clear()
                with suppress(NatsError):
                    await subscription.unsubscribe()

    async def _check_until_clear(self, node: str) -> None:
        """Ping once for each report, and every second while a service of the node does not answer."""
        while node in self._reported or self._unresponsive_of(node):
            self._reported.discard(node)
            answered = await self._ping(node)
            if answered is not None:
                self._update(node, unresponsive_keys(node, self._live.keys(), answered))
            await asyncio.sleep(PING_DEADLINE_S)

    def _unresponsive_of(self, node: str) -> set[str]:
        keys = self.unresponsive.keys()
        return {key for key in keys if key.partition(".")[0] == node}

    def _update(self, node: str, unresponsive: set[str]) -> None:
        before = self._unresponsive_of(node)
        for key in sorted(before - unresponsive):
            self.unresponsive.apply(key, None)
        newly = sorted(unresponsive - before)
        if newly:
            services = ",".join(key.partition(".")[2] for key in newly)
            log.warning(
                "node does not answer; these services count as down until it does", name=node, services=services
            )
        for key in newly:
            self.unresponsive.apply(key, b"")

    async def _ping(self, node: str) -> dict[str, bool] | None:
        """Return which services of a node answer; None if NATS may be why they do not."""
        nats, connection = self._context.nats, self._context.nats.reconnects.count
        services = services_to_ping(node, self._live.keys())
        own_answer, *answers = await asyncio.gather(
            self._does_answer("placement", self._context.node),
            *(self._does_answer(service, node) for service in services),
        )
        if not own_answer or connection != nats.reconnects.count:
            return None
        return dict(zip(services, answers, strict=True))

    async def _does_answer(self, service: str, node: str) -> bool:
        try:
            await self._context.rpc(service, node, PING, Empty(), Empty, PING_DEADLINE_S)
        except (ShoalError, NatsError):
            return False
        return True
