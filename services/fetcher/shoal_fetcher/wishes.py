"""What people want on this node: `spec` at `download.<node>.*`, of which this service is the only writer.

A wish stands while there is work, and while it is paused. Whatever ends or stops it first answers the commands that
wait for it, in `done`: one that is delivered again, to the successor of a fetcher that was killed, finds its answer
there, and does not begin anew what a person has taken back since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from msgspec import structs

from shoal_common import clock
from shoal_common.buckets import Buckets, done_key, download_key
from shoal_common.errors import ShoalError
from shoal_common.messages.commands import Outcome
from shoal_common.messages.records import DownloadSpec
from shoal_common.tensors import union

_COMMANDS = 64
"""Ids that a wish remembers; of more who wait for one download, the last."""


def joined(one: list[list[int]], other: list[list[int]]) -> list[list[int]]:
    """The layers that both want together; all of the model, which is none, where one of them wants that."""
    return union([*one, *other]) if one and other else []


class Wishes:
    """The wishes of one node, by model. What is said here is in `spec` when a call returns."""

    def __init__(self, buckets: Buckets, node: str, found: Iterable[DownloadSpec]) -> None:
        self._buckets, self._node = buckets, node
        self._held = {wish.model: wish for wish in found}
        self._writing = asyncio.Lock()

    def get(self, name: str) -> DownloadSpec | None:
        """The wish for a model, if there is one."""
        return self._held.get(name)

    @property
    def names(self) -> list[str]:
        """The models that are wanted, paused ones included."""
        return sorted(self._held)

    def is_paused(self, name: str) -> bool:
        """Whether a person has stopped it."""
        wish = self._held.get(name)
        return wish is not None and wish.paused

    async def ask(self, name: str, command: str, layers: list[list[int]]) -> None:
        """Somebody wants these layers of it, or all, now: a pause ends."""
        wish = self._held.get(name)
        if wish is None:
            wish = DownloadSpec(model=name, asked_at_s=round(clock.now_s(), 3), layers=layers)
        wish = structs.replace(wish, layers=joined(wish.layers, layers))
        others = [c for c in wish.commands if c != command]
        await self._put(structs.replace(wish, paused=False, commands=[*others, command][-_COMMANDS:]))

    async def pause(self, name: str, why: ShoalError) -> None:
        """A person stops it."""
        wish = self._held[name]
        await self._answer(wish, why)
        await self._put(structs.replace(wish, paused=True, commands=[]))

    async def go_on(self, name: str) -> None:
        """A person lets it go on."""
        await self._put(structs.replace(self._held[name], paused=False))

    async def end(self, name: str, result: object) -> None:
        """There is nothing to want any more: `result` is a struct, or the error it ended with. Idempotent."""
        wish = self._held.get(name)
        if wish is not None:
            await self._answer(wish, result)
        async with self._writing:
            await self._buckets.spec.delete(download_key(self._node, name))
            self._held.pop(name, None)

    async def say_again(self) -> None:
        """Write all of them: NATS has lost them, and nobody has taken them back."""
        async with self._writing:
            for name, wish in self._held.items():
                await self._buckets.spec.put(download_key(self._node, name), wish)

    async def _answer(self, wish: DownloadSpec, result: object) -> None:
        error = result.body() if isinstance(result, ShoalError) else None
        for command in wish.commands:
            outcome = Outcome(
                id=command,
                ok=error is None,
                node=self._node,
                service="fetcher",
                verb="download",
                result=msgspec.to_builtins(result) if error is None else {},
                error=error,
                ended_at_s=round(clock.now_s(), 3),
            )
            await self._buckets.done.create(done_key(command), outcome)

    async def _put(self, wish: DownloadSpec) -> None:
        async with self._writing:
            await self._buckets.spec.put(download_key(self._node, wish.model), wish)
            self._held[wish.model] = wish
