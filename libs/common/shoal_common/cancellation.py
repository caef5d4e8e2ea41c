"""Reliable cancellation.

`asyncio.wait_for` of Python 3.11 loses a cancellation that arrives together with the result, and nats-py uses it
everywhere: a task that is cancelled once, while a reply from NATS arrives, would continue as if nothing had happened.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")

_RETRY_S = 0.5


def patch_wait_for() -> None:
    """Replace asyncio's `wait_for` on Python 3.11 with that of 3.12, which loses no cancellation."""
    if sys.version_info < (3, 12):
        asyncio.wait_for = wait_for  # type: ignore[assignment]  # typeshed overloads it; the calls are the same


async def wait_for(awaited: Awaitable[T], timeout: float | None) -> T:
    """Wait `timeout` seconds (None: for ever), as `asyncio.wait_for` of Python 3.12 does. Raises TimeoutError."""
    if timeout is not None and timeout <= 0:
        done = asyncio.ensure_future(awaited)
        if not done.done():
            await cancel_and_wait(done)
        try:
            return done.result()
        except asyncio.CancelledError as e:
            raise TimeoutError from e
    async with asyncio.timeout(timeout):
        return await awaited


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks until all have ended. An exception stays in its task, for its owner."""
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_RETRY_S)
