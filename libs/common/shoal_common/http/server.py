"""uvicorn inside a service's main loop, which handles the signals; idle it wakes once a second, not ten times."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from shoal_common.http.bounded_protocol import BoundedHttpProtocol, HttpRules, protocol_of
from shoal_common.http.bounds import fit_to_files

_TICK_INTERVAL_S = 1.0
"""Maximum age of the Date header in its responses."""


def http_config(
    app: Any,
    rules: HttpRules,
    protocol: type[BoundedHttpProtocol] = BoundedHttpProtocol,
    keep_alive_s: int = 5,
    graceful_shutdown_s: int = 5,
    tls: ssl.SSLContext | None = None,
) -> uvicorn.Config:
    """Return the configuration of a server of an ASGI application, within the files that this process may open."""
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max_files != resource.RLIM_INFINITY:
        rules.bounds = fit_to_files(rules.bounds, max_files)
    return uvicorn.Config(
        app,
        http=protocol_of(protocol, rules=rules, tls=tls),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=rules.bounds.backlog,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=graceful_shutdown_s,
    )


class HttpServer(uvicorn.Server):
    """A server that ends when `stopping` is set. Calls `on_started` once it listens."""

    def __init__(
        self, config: uvicorn.Config, stopping: asyncio.Event, on_started: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._stopping, self._on_started = stopping, on_started
        # Errors that a hostile client can cause are not worth a log line each; this server's own are.
        logging.getLogger("uvicorn").setLevel(logging.ERROR)

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
