"""Ending tasks for certain.

`asyncio.wait_for` of Python 3.11 loses a cancellation that meets its result, and nats-py waits with it everywhere: a
task that is cancelled once, while an answer of NATS arrives, would go on as if nothing had been said.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

_AGAIN_S = 0.5


def keep_cancellations() -> None:
    """Give asyncio of Python 3.11 the `wait_for` of 3.12, which loses none. Later versions are left alone."""
    if sys.version_info < (3, 12):
        asyncio.wait_for = wait_for  # type: ignore[assignment]  # typeshed overloads it; the calls are the same


async def wait_for(awaited: Awaitable[T], timeout: float | None) -> T:
    """Wait so many seconds (None: for ever), as `asyncio.wait_for` of Python 3.12 does. Raises TimeoutError."""
    if timeout is not None and timeout <= 0:
        done = asyncio.ensure_future(awaited)
        if not done.done():
            await ended(done)
        try:
            return done.result()
        except asyncio.CancelledError as e:
            raise TimeoutError from e
    async with asyncio.timeout(timeout):
        return await awaited


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks until all have ended. What one of them raised stays in it, for its owner."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
