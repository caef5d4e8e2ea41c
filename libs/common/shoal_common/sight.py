"""Telling that a connection to another node broke: it is known at once then, and by its liveness key much later.

It is a hint, and nobody acts on it alone: placement's leader asks the node whether it is there.
"""

from __future__ import annotations

import time
from contextlib import suppress

from nats.errors import Error as NatsError

from shoal_common import subjects
from shoal_common.connection import Nats
from shoal_common.messages import encode
from shoal_common.messages.facts import LostSight

SAY_EVERY_S = 2.0
"""Of one node no more often than this: a dead one is tried by many, again and again."""
_NODES_AT_MOST = 1024


class Sight:
    """What one service tells of other nodes."""

    def __init__(self, nats: Nats, node: str) -> None:
        self._nats, self._me = nats, node
        self._said_s: dict[str, float] = {}

    async def lost(self, node: str, why: str) -> None:
        """A connection to a node broke or was refused."""
        now_s = time.monotonic()
        if node == self._me or now_s - self._said_s.get(node, -SAY_EVERY_S) < SAY_EVERY_S:
            return
        if len(self._said_s) >= _NODES_AT_MOST:
            self._said_s.clear()
        self._said_s[node] = now_s
        with suppress(NatsError):
            await self._nats.client.publish(subjects.lost(node), encode(LostSight(by=self._me, why=why)))
