"""Download requests of this node: `spec` keys `download.<node>.*`, which only this service writes.

A request exists while the download runs or is paused. Whatever ends or pauses it first answers the waiting commands
in `done`: a command that is redelivered to the successor of a killed fetcher finds its answer there, and does not
restart what a person has cancelled since.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import structs

from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import download_key
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.errors import Busy, ShoalError
from shoal_common.messages.downloads import DownloadRequest
from shoal_common.rpc.outcomes import Outcomes, make_outcome
from shoal_fetcher.downloads.state_machine import merge_layers

MAX_DOWNLOADS = 256
"""Running and paused together."""
_MAX_COMMANDS = 64
"""Command ids that a request remembers: the newest ones."""


class DownloadRequests:
    """The download requests of one node, by model. A change is stored in `spec` when the call returns.

    Whoever changes the request of a model waits for that before the next change of it; other models do not matter.
    """

    def __init__(self, buckets: Buckets, node: str, stored: Iterable[DownloadRequest]) -> None:
        self._buckets, self._outcomes, self._node = buckets, Outcomes(buckets), node
        self._requests = {request.model: request for request in stored}
        self._arriving: set[str] = set()

    def get(self, name: str) -> DownloadRequest | None:
        """Return the request for a model, or None."""
        return self._requests.get(name)

    @property
    def names(self) -> list[str]:
        """The requested models, paused ones included."""
        return sorted(self._requests)

    async def request(self, name: str, command: str, layers: list[list[int]], force: bool = False) -> DownloadRequest:
        """Request these layers of a model, or all of it; ends a pause. Raises Busy beyond MAX_DOWNLOADS."""
        request = self._requests.get(name)
        if request is None:
            if len(self._requests) + len(self._arriving) >= MAX_DOWNLOADS:
                raise Busy(
                    f"{MAX_DOWNLOADS} downloads are running or paused on this node; wait for one, or cancel one"
                )
            request = DownloadRequest(model=name, requested_at_s=round(cluster_clock.now_s(), 3), layers=layers)
            self._arriving.add(name)
        request = structs.replace(request, layers=merge_layers(request.layers, layers), force=request.force or force)
        others = [c for c in request.commands if c != command]
        try:
            return await self._put(
                structs.replace(request, paused=False, commands=[*others, command][-_MAX_COMMANDS:])
            )
        finally:
            self._arriving.discard(name)

    async def pause(self, name: str, error: ShoalError) -> None:
        """Pause the download; `error` is raised to the commands that wait for it."""
        request = self._requests[name]
        await self._answer(request, error)
        await self._put(structs.replace(request, paused=True, commands=[]))

    async def resume(self, name: str) -> DownloadRequest:
        """End the pause."""
        return await self._put(structs.replace(self._requests[name], paused=False))

    async def end(self, name: str, result: object) -> None:
        """Delete the request; `result` is a struct, or the error that ended the download. Idempotent."""
        request = self._requests.get(name)
        if request is not None:
            await self._answer(request, result)
        await self._buckets.spec.delete(download_key(self._node, name))
        self._requests.pop(name, None)

    async def republish(self, name: str) -> None:
        """Write a request again: NATS has lost its store."""
        await self._put(self._requests[name])

    async def _answer(self, request: DownloadRequest, result: object) -> None:
        for command in request.commands:
            await self._outcomes.record(make_outcome(command, "fetcher", self._node, "download", result))

    async def _put(self, request: DownloadRequest) -> DownloadRequest:
        await self._buckets.spec.put(download_key(self._node, request.model), request)
        self._requests[request.model] = request
        return request
