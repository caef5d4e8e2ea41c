"""Reports that a connection to another node broke, long before that node's liveness key expires.

A report is a hint, and nobody acts on it alone: placement's leader pings the node first.
"""

from __future__ import annotations

import time
from contextlib import suppress

from nats.errors import Error as NatsError

from shoal_common.bus import subjects
from shoal_common.bus.connection import Nats
from shoal_common.messages import encode
from shoal_common.messages.liveness import PeerConnectionLost

REPORT_INTERVAL_S = 2.0
"""Minimum time between reports about one node: many services retry a dead one again and again."""
_MAX_NODES = 1024


class PeerFailureReporter:
    """Reports one service's failed connections to other nodes."""

    def __init__(self, nats: Nats, node: str) -> None:
        self._nats, self._node = nats, node
        self._reported_s: dict[str, float] = {}

    async def report(self, node: str, reason: str) -> None:
        """Report that a connection to a node broke or was refused."""
        now_s = time.monotonic()
        if node == self._node or now_s - self._reported_s.get(node, -REPORT_INTERVAL_S) < REPORT_INTERVAL_S:
            return
        if len(self._reported_s) >= _MAX_NODES:
            self._reported_s.clear()
        self._reported_s[node] = now_s
        with suppress(NatsError):
            await self._nats.client.publish(
                subjects.peer_lost(node), encode(PeerConnectionLost(reported_by=self._node, reason=reason))
            )
