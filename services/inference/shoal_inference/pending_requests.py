"""Requests that a stage's process has not accepted yet, and the callers that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from shoal_common.errors import InternalError, ShoalError, Unavailable, from_body
from shoal_common.messages.generation import Accepted, Generate, TokenEvent

_ACCEPT_TIMEOUT_S = 30.0


class PendingRequests:
    """Those of one instance, by id."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._accepting: dict[str, asyncio.Future[Accepted]] = {}

    async def send(self, request: Generate, send: Callable[[], Awaitable[None]]) -> Accepted:
        """Return once a request is sent and accepted. Raises what the stage answers, InternalError, Unavailable."""
        if request.request in self._accepting:
            raise InternalError(f"request {request.request} is already in flight; use a new request id")
        accepted: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        self._accepting[request.request] = accepted
        try:
            await send()
            async with asyncio.timeout(_ACCEPT_TIMEOUT_S):
                return await accepted
        except TimeoutError:
            raise Unavailable(
                f"instance {self._instance} did not accept the prompt within {_ACCEPT_TIMEOUT_S:.0f} s; "
                "try again, or see `shoal ps`"
            ) from None
        finally:
            self._accepting.pop(request.request, None)

    def accept(self, accepted: Accepted) -> None:
        """Record that the stage has accepted a request."""
        waiting = self._accepting.get(accepted.request)
        if waiting is not None and not waiting.done():
            waiting.set_result(accepted)

    def fail_all(self, error: ShoalError) -> None:
        """Fail every request that waits."""
        for waiting in self._accepting.values():
            if not waiting.done():
                waiting.set_exception(error)

    def refuse(self, event: TokenEvent) -> bool:
        """Fail a request that waits with the error of an event. Returns False if it is no error, or nobody waits."""
        waiting = self._accepting.get(event.request)
        if event.error is None or waiting is None or waiting.done():
            return False
        waiting.set_exception(from_body(event.error))
        return True
