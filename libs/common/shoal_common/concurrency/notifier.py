"""Waiting for something to change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Notifier:
    """Counts changes and wakes those who wait for one. For one event loop.

    Who reads `count` before it looks at what changes, and waits after that count, misses nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        """Number of changes so far."""
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Record a change."""
        self.count += 1
        self._changed.set()  # wakes all who wait now
        self._changed.clear()

    async def wait_after(self, seen: int) -> int:
        """Return the count once it exceeds `seen`."""
        while self.count <= seen:
            await self._changed.wait()
        return self.count

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once the condition holds; it is asked now and after each change."""
        while not condition():
            await self._changed.wait()
