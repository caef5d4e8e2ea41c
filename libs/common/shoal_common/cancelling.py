"""Ending tasks for certain.

`asyncio.wait_for` of Python 3.11 loses a cancellation that meets its result, and nats-py waits with it everywhere: a
task that is cancelled once, while an answer of NATS arrives, goes on as if nothing had been said.
"""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN_S = 0.5


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks until all have ended. What one of them raised stays in it, for its owner."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
