"""Equal work that is asked for at the same time runs once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Flight(Generic[T]):
    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.task = asyncio.create_task(work)
        self.callers_count = 0
        self.abandoned = False


class SingleFlight(Generic[T]):
    """Shares one running call, its result or its exception, among the callers of the same key.

    A caller that is cancelled affects no other. When the last one is, so is the work.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    async def __call__(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what `work` returns, started now or by an earlier caller."""
        while (flight := self._flights.get(key)) is not None and flight.abandoned:
            await asyncio.wait({flight.task})  # its clean-up must not meet the next call
        if flight is None:
            flight = self._flights[key] = _Flight(work())
            flight.task.add_done_callback(lambda task: self._ended(key, task))
        flight.callers_count += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.callers_count -= 1
            if not flight.callers_count and not flight.task.done():
                flight.abandoned = True
                flight.task.cancel()

    def _ended(self, key: Hashable, task: asyncio.Task[T]) -> None:
        del self._flights[key]
        if not task.cancelled():
            task.exception()  # retrieved: maybe nobody waits any more
