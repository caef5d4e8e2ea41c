"""The cache that was promised to an instance, in tokens, and the requests that share it.

A request takes room for its prompt, and for what it generates as it grows, in the steps in which caches grow. Where
one needs more than is left, the youngest gives way: its caches are freed, and it begins again when there is room,
from its tokens so far. The oldest never does, so one always goes on to its end.
"""

from __future__ import annotations

from shoal_common.concurrency.notifier import Notifier
from shoal_common.models.kv_cache import cache_steps


class Preempted(Exception):
    """This request has to give its room back, and to begin again later."""


class KvBudget:
    """Who has how much of it. For one event loop."""

    def __init__(self, context_tokens: int, answers: int) -> None:
        """The promise is for so many answers as long as the context."""
        self._whole = answers * cache_steps(context_tokens)
        self._taken: dict[bytes, int] = {}
        """Steps by request, the oldest first."""
        self._waiting: list[bytes] = []
        """First who is next."""
        self._growing: set[bytes] = set()
        self._leaving: set[bytes] = set()
        self._changed = Notifier()

    @property
    def free_steps(self) -> int:
        """What nobody has taken."""
        return self._whole - sum(self._taken.values())

    async def acquire(self, key: bytes, tokens: int, again: bool = False) -> None:
        """Take room for the tokens that a request begins with, once there is some and nobody goes before it.

        One that was displaced, `again`, goes before all that wait; those that grow go before it.
        """
        self._waiting.insert(0 if again else len(self._waiting), key)
        try:
            await self._changed.wait_until(
                lambda: self._waiting[0] == key and not self._growing and cache_steps(tokens) <= self.free_steps
            )
            self._taken[key] = cache_steps(tokens)
        finally:
            self._waiting.remove(key)
            self._changed.notify()

    async def extend(self, key: bytes, tokens: int) -> None:
        """Have room for so many tokens in all, and wait until younger ones have given it.

        Raises Displaced where an older one needs what this one has, or this one is the youngest itself.
        """
        more = cache_steps(tokens) - self._taken[key]
        if more > self.free_steps and key not in self._leaving:
            self._growing.add(key)
            try:
                while more > self.free_steps and key not in self._leaving:
                    self._preempt_youngest(key, more)
                    self._changed.notify()
                    await self._changed.wait_until(lambda: key in self._leaving or more <= self.free_steps)
            finally:
                self._growing.discard(key)
                self._changed.notify()
        if key in self._leaving:
            raise Preempted
        self._taken[key] += max(more, 0)

    def release(self, key: bytes) -> None:
        """Give all of it back."""
        self._leaving.discard(key)
        if self._taken.pop(key, None) is not None:
            self._changed.notify()

    def _preempt_youngest(self, key: bytes, more: int) -> None:
        """Have the youngest leave until there is enough; the one that asks is among them, the oldest never is."""
        free = self.free_steps + sum(self._taken[k] for k in self._leaving)
        for youngest in [k for k in reversed(self._taken) if k not in self._leaving]:
            if free >= more:
                return
            self._leaving.add(youngest)
            if youngest == key:
                return
            free += self._taken[youngest]
