"""Mirrors that have caught up with NATS: they show all that was written before the call."""

from __future__ import annotations

import asyncio

from shoal_common.bus.connection import Nats
from shoal_common.bus.kv_mirror import KvMirror, wait_caught_up
from shoal_common.errors import Unavailable

_CATCH_UP_TIMEOUT_S = 5.0


async def catch_up(nats: Nats, *mirrors: KvMirror) -> None:
    """Wait until the mirrors show all that was written before. Raises Unavailable after 5 s."""
    try:
        await asyncio.gather(*(wait_caught_up(nats, mirror, _CATCH_UP_TIMEOUT_S) for mirror in mirrors))
    except TimeoutError:
        raise Unavailable(
            "placement could not read the cluster's state from NATS within 5 s: try again in a moment"
        ) from None
