"""A rate limit that several transfers share: a token bucket whose rate may change while it is in use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from shoal_common.concurrency.notifier import Notifier

_BURST_S = 0.1


class RateLimiter:
    """Limits a rate to `bytes_per_s`; None means unlimited.

    Callers are served in order of arrival. One that takes more than is available waits for its share, and the next
    one waits for it: any size gets through, however low the rate.
    """

    def __init__(self, bytes_per_s: int | None = None, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock_s = bytes_per_s, clock_s
        self._free_at_s = clock_s()
        self._changed = Notifier()

    @property
    def bytes_per_s(self) -> int | None:
        """The current limit."""
        return self._rate

    def set_rate(self, bytes_per_s: int | None) -> None:
        """Change the limit, for waiting callers too."""
        if bytes_per_s == self._rate:
            return
        now_s = self._clock_s()
        owed_bytes = max(self._free_at_s - now_s, 0.0) * (self._rate or 0)
        self._rate = bytes_per_s
        self._free_at_s = now_s + owed_bytes / bytes_per_s if bytes_per_s else now_s
        self._changed.notify()

    async def acquire(self, count: int) -> None:
        """Return when `count` bytes may pass."""
        if not self._rate:
            return
        start_s = max(self._free_at_s, self._clock_s() - _BURST_S)
        self._free_at_s = start_s + count / self._rate
        due_s, rate = self._free_at_s, self._rate
        while self._rate and (wait_s := due_s - self._clock_s()) > 0:
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait_after(self._changed.count)
            except TimeoutError:
                return
            if self._rate:
                now_s = self._clock_s()
                due_s, rate = now_s + max(due_s - now_s, 0.0) * rate / self._rate, self._rate
