"""Views that show all that was written before now: what another leader or service did a moment ago is in NATS."""

from __future__ import annotations

import asyncio

from shoal_common.connection import Nats
from shoal_common.errors import Unavailable
from shoal_common.watch import View, caught_up

_CATCH_UP_S = 5.0


async def catch_up(nats: Nats, *views: View) -> None:
    """Return once the views show it. Raises Unavailable."""
    try:
        await asyncio.gather(*(caught_up(nats, view, _CATCH_UP_S) for view in views))
    except TimeoutError:
        raise Unavailable("placement cannot see the cluster just now: ask again in a moment") from None
