"""Blocking calls under a deadline.

In threads that nobody waits for: `asyncio.to_thread` would be joined at the end of the process, and a stat on a
network file system whose server is away, or a name server that is, may take minutes.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def within(deadline_s: float, call: Callable[[], T]) -> T:
    """The result of a blocking call, or TimeoutError; the call then goes on by itself."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]  # without an error there is a result

    def run() -> None:
        result, failed = None, None
        try:
            result = call()
        except BaseException as e:  # noqa: BLE001  # handed to who waits
            failed = e
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failed)

    threading.Thread(target=run, daemon=True).start()
    async with asyncio.timeout(deadline_s):
        return await answer


async def resolve(host: str, deadline_s: float) -> str:
    """The first address of a host name. Raises OSError, TimeoutError."""
    found = await within(deadline_s, lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
    return str(found[0][4][0])
