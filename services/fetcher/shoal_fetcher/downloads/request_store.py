"""Download requests of this node: `spec` keys `download.<node>.*`, which only this service writes.

A request exists while the download runs or is paused. Whatever ends or pauses it first answers the waiting commands
in `done`: a command that is redelivered to the successor of a killed fetcher finds its answer there, and does not
restart what a person has cancelled since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from msgspec import structs

from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import download_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.errors import ShoalError
from shoal_common.messages.downloads import DownloadRequest
from shoal_common.models.layer_tensors import union
from shoal_common.rpc.outcomes import Outcomes, make_outcome

_MAX_COMMANDS = 64
"""Command ids that a request remembers: the newest ones."""


def merge_layers(layers: list[list[int]], more: list[list[int]]) -> list[list[int]]:
    """Return the union of two sets of layers; empty, which means the whole model, if either is."""
    return union([*layers, *more]) if layers and more else []


class DownloadRequests:
    """The download requests of one node, by model. A change is stored in `spec` when the call returns."""

    def __init__(self, buckets: Buckets, node: str, stored: Iterable[DownloadRequest]) -> None:
        self._buckets, self._outcomes, self._node = buckets, Outcomes(buckets), node
        self._requests = {request.model: request for request in stored}
        self._writing = asyncio.Lock()

    def get(self, name: str) -> DownloadRequest | None:
        """Return the request for a model, or None."""
        return self._requests.get(name)

    @property
    def names(self) -> list[str]:
        """The requested models, paused ones included."""
        return sorted(self._requests)

    def is_paused(self, name: str) -> bool:
        """Return whether a person paused it."""
        request = self._requests.get(name)
        return request is not None and request.paused

    async def request(self, name: str, command: str, layers: list[list[int]]) -> None:
        """Request these layers of a model, or all of it; ends a pause."""
        request = self._requests.get(name)
        if request is None:
            request = DownloadRequest(model=name, requested_at_s=round(cluster_clock.now_s(), 3), layers=layers)
        request = structs.replace(request, layers=merge_layers(request.layers, layers))
        others = [c for c in request.commands if c != command]
        await self._put(structs.replace(request, paused=False, commands=[*others, command][-_MAX_COMMANDS:]))

    async def pause(self, name: str, error: ShoalError) -> None:
        """Pause the download; `error` is raised to the commands that wait for it."""
        request = self._requests[name]
        await self._answer(request, error)
        await self._put(structs.replace(request, paused=True, commands=[]))

    async def resume(self, name: str) -> None:
        """End the pause."""
        await self._put(structs.replace(self._requests[name], paused=False))

    async def end(self, name: str, result: object) -> None:
        """Delete the request; `result` is a struct, or the error that ended the download. Idempotent."""
        request = self._requests.get(name)
        if request is not None:
            await self._answer(request, result)
        async with self._writing:
            await self._buckets.spec.delete(download_key(self._node, name))
            self._requests.pop(name, None)

    async def republish(self) -> None:
        """Write all requests again: NATS has lost its store."""
        async with self._writing:
            for name, request in self._requests.items():
                await self._buckets.spec.put(download_key(self._node, name), request)

    async def _answer(self, request: DownloadRequest, result: object) -> None:
        for command in request.commands:
            await self._outcomes.record(make_outcome(command, "fetcher", self._node, "download", result))

    async def _put(self, request: DownloadRequest) -> None:
        async with self._writing:
            await self._buckets.spec.put(download_key(self._node, request.model), request)
            self._requests[request.model] = request
