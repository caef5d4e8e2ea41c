"""Events: a log of what happened, bounded by age and size. State never depends on it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nats.errors import Error as NatsError

from shoal_common import telemetry
from shoal_common.bus import cluster_clock, subjects
from shoal_common.bus.connection import Nats
from shoal_common.bus.network_use import require_network_allowed
from shoal_common.messages import encode


class EventEmitter:
    """Emits one service's events."""

    def __init__(self, nats: Nats, service: str, node: str) -> None:
        self._nats, self._service, self._node = nats, service, node

    async def emit(self, name: str, **fields: Any) -> None:
        """Publish `shoal.v1.evt.<service>.<node>.<name>`. An outage loses the event, but no state."""
        require_network_allowed()
        body = {"at_s": round(cluster_clock.now_s(), 3), **fields}
        with suppress(NatsError):
            await self._nats.client.publish(
                subjects.event(self._service, self._node, name), encode(body), headers=telemetry.headers()
            )
