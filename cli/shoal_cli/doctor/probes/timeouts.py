"""Blocking calls under a deadline."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TypeVar

from shoal_common.concurrency.threads import start_daemon_call

T = TypeVar("T")


async def run_with_timeout(deadline_s: float, call: Callable[[], T]) -> T:
    """Return the result of a blocking call. Raises TimeoutError; the call then goes on by itself."""
    async with asyncio.timeout(deadline_s):
        return await start_daemon_call(call)


async def resolve_host(host: str, deadline_s: float) -> str:
    """Return the first address of a host name. Raises OSError, TimeoutError."""
    found = await run_with_timeout(deadline_s, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    return str(found[0][4][0])
