"""uvicorn inside the common main loop: signals are that loop's, and idle it wakes once a second, not ten times."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

_TICK_S = 1.0
"""The date in its answers is as old as this at most."""


class HttpServer(uvicorn.Server):
    """A server that ends when `stopping` is set. `on_started` is called once it listens."""

    def __init__(
        self, config: uvicorn.Config, stopping: asyncio.Event, on_started: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._stopping, self._on_started = stopping, on_started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell that we listen, once we do."""
        await super().startup(sockets)
        self._on_started()

    async def main_loop(self) -> None:
        """Run until told to stop. uvicorn's own loop looks ten times a second whether it should."""
        while not self._stopping.is_set() and not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._stopping.wait()
