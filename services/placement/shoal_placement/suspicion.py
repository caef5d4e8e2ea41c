"""The leader asks nodes to which somebody has lost a connection whether they are there: `suspect.py` decides."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from shoal_common import subjects
from shoal_common.errors import BadName, ShoalError
from shoal_common.logs import Log
from shoal_common.messages.questions import Done
from shoal_common.names import check_node
from shoal_common.questions import HERE
from shoal_common.service import Context
from shoal_common.watch import View
from shoal_placement.suspect import silent_keys, to_ask

log = Log("placement")

ANSWER_DEADLINE_S = 1.0
_NODES_AT_ONCE = 64


class Suspicion:
    """The keys of `live` whose services do not answer, as long as they do not."""

    def __init__(self, context: Context, live: View) -> None:
        self._context, self._live = context, live
        self.silent = View("silent")
        """By the keys of `live`; the values say nothing."""
        self._reported: set[str] = set()

    def nodes(self, service: str) -> set[str]:
        """Nodes whose service does not answer."""
        keys = self.silent.keys()
        return {key.partition(".")[0] for key in keys if key.endswith(f".{service}")}

    async def run(self) -> None:
        """Listen for connections that broke, and ask, until cancelled. Then nobody is suspect."""
        async with asyncio.TaskGroup() as tasks:
            asking: set[str] = set()

            async def ask(node: str) -> None:
                try:
                    await self._look_into(node)
                finally:
                    asking.discard(node)

            async def heard(message: Msg) -> None:
                with suppress(BadName):
                    node = check_node(message.subject.rpartition(".")[2])
                    if node in asking or len(asking) < _NODES_AT_ONCE:
                        self._reported.add(node)
                    if node not in asking and node in self._reported:
                        asking.add(node)
                        tasks.create_task(ask(node))

            subscription = await self._context.nats.client.subscribe(subjects.lost("*"), cb=heard)
            try:
                await asyncio.Event().wait()
            finally:
                self.silent.replace({})
                self._reported.clear()
                with suppress(NatsError):
                    await subscription.unsubscribe()

    async def _look_into(self, node: str) -> None:
        """Ask once for each report, and every second while something of the node is silent."""
        while node in self._reported or self._suspects(node):
            self._reported.discard(node)
            answered = await self._ask(node)
            if answered is not None:
                self._note(node, silent_keys(node, self._live.keys(), answered))
            await asyncio.sleep(ANSWER_DEADLINE_S)

    def _suspects(self, node: str) -> set[str]:
        keys = self.silent.keys()
        return {key for key in keys if key.partition(".")[0] == node}

    def _note(self, node: str, silent: set[str]) -> None:
        before = self._suspects(node)
        for key in sorted(before - silent):
            self.silent.apply(key, None)
        for key in sorted(silent - before):
            log.warning("a service is live and does not answer: it counts as away until it does", key=key)
            self.silent.apply(key, b"")

    async def _ask(self, node: str) -> dict[str, bool] | None:
        """Which services of a node answer; None where NATS may be to blame that they do not."""
        nats, connection = self._context.nats, self._context.nats.reconnects.count
        services = to_ask(node, self._live.keys())
        ours, *answers = await asyncio.gather(
            self._answers("placement", self._context.node), *(self._answers(service, node) for service in services)
        )
        if not ours or connection != nats.reconnects.count:
            return None
        return dict(zip(services, answers, strict=True))

    async def _answers(self, service: str, node: str) -> bool:
        try:
            await self._context.ask(service, node, HERE, Done(), Done, ANSWER_DEADLINE_S)
        except (ShoalError, NatsError):
            return False
        return True
