"""Blocking calls under a deadline.

In threads that nobody waits for: `asyncio.to_thread` would be joined at exit, and a stat on a network file system
whose server is down, or a name server that is, may take minutes.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def run_with_timeout(deadline_s: float, call: Callable[[], T]) -> T:
    """Return the result of a blocking call. Raises TimeoutError; the call then goes on by itself."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def resolve(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]  # without an error there is a result

    def run() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as e:  # noqa: BLE001  # raised where the result is awaited
            error = e
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(resolve, result, error)

    threading.Thread(target=run, daemon=True).start()
    async with asyncio.timeout(deadline_s):
        return await answer


async def resolve_host(host: str, deadline_s: float) -> str:
    """Return the first address of a host name. Raises OSError, TimeoutError."""
    found = await run_with_timeout(deadline_s, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    return str(found[0][4][0])
