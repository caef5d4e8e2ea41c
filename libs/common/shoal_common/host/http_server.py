"""uvicorn inside a service's main loop, which handles the signals; idle it wakes once a second, not ten times."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

_TICK_INTERVAL_S = 1.0
"""Maximum age of the Date header in its responses."""


class HttpServer(uvicorn.Server):
    """A server that ends when `stopping` is set. Calls `on_started` once it listens."""

    def __init__(
        self, config: uvicorn.Config, stopping: asyncio.Event, on_started: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._stopping, self._on_started = stopping, on_started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture no signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then report that the server listens."""
        await super().startup(sockets)
        self._on_started()

    async def main_loop(self) -> None:
        """Run until `stopping`. uvicorn's own loop polls ten times a second."""
        while not self._stopping.is_set() and not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_INTERVAL_S):
                    await self._stopping.wait()
