"""Run blocking disk work in threads, to its end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import ParamSpec, TypeVar

from shoal_common.concurrency.cancellation import run_to_completion

P = ParamSpec("P")
T = TypeVar("T")
_MAX_THREADS = 4


class LeafWorkers(AbstractAsyncContextManager["LeafWorkers"]):
    """Threads that hash and write leaves. Leaving `async with` waits for them.

    Separate from the loop's own threads, which may all wait for an fsync.
    """

    def __init__(self) -> None:
        # More than there are cores would only wait for each other, at the file.
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), "leaves")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run blocking work in one of the threads, and return only when it has ended, even if cancelled."""
        loop = asyncio.get_running_loop()
        return await run_to_completion(loop.run_in_executor(self._threads, partial(call, *args, **kwargs)))

    async def __aexit__(self, *_: object) -> None:
        await run_in_default_executor(self._threads.shutdown)


async def run_in_default_executor(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread, and return only when it has ended, even if cancelled.

    The file is closed afterwards: a thread that still wrote would write into whatever has its descriptor then.
    """
    return await run_to_completion(asyncio.get_running_loop().run_in_executor(None, partial(call, *args, **kwargs)))
