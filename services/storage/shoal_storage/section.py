"""Storage's critical section: one task at a time decides by the ledger, and changes ledger and disk together.

Inside: decisions, and short disk I/O in threads. Outside: NATS, requests to other services, waits, scans of a whole
store. What was decided inside is published, and told to others, after it. Who gives the section up between a decision
and its consequence decides again.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from types import TracebackType

from shoal_common.bus.network_use import allow_network, disallow_network


class Held(ABC):
    """The critical section while a task holds it; only `async with section as held` gives one.

    Functions that must run inside take it as a parameter.
    """

    @abstractmethod
    def require(self) -> None:
        """Raise AssertionError if the section has been left."""


class _Held(Held):
    def __init__(self) -> None:
        self.task = asyncio.current_task()
        self.has_ended = False

    def require(self) -> None:
        if self.has_ended:
            raise AssertionError("the critical section has been left")


class CriticalSection:
    """The lock. A task that holds it cannot use NATS: that raises AssertionError."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._holder: _Held | None = None
        self.transitions = 0
        """How often the section was entered or left: unchanged means that nobody was inside meanwhile."""

    async def __aenter__(self) -> Held:
        if self._holder is not None and self._holder.task is asyncio.current_task():
            raise AssertionError("this task holds the critical section already")
        await self._lock.acquire()
        self._holder = _Held()
        self.transitions += 1
        disallow_network()
        return self._holder

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._holder is not None
        self._holder.has_ended = True
        self._holder = None
        self.transitions += 1
        allow_network()
        self._lock.release()
