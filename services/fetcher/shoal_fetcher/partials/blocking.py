"""Run blocking disk work in threads, to its end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from shoal_common.concurrency.cancellation import run_to_completion

P = ParamSpec("P")
T = TypeVar("T")
_workers = ThreadPoolExecutor(min(os.cpu_count() or 1, 4), "leaves")
"""Threads that hash and write leaves; more than there are cores would only wait for each other, at the file.

Separate from the loop's own threads, which may all wait for an fsync.
"""


async def run_in_default_executor(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread, and return only when it has ended, even if cancelled.

    The file is closed afterwards: a thread that still wrote would write into whatever has its descriptor then.
    """
    return await run_to_completion(asyncio.get_running_loop().run_in_executor(None, partial(call, *args, **kwargs)))


async def run_blocking(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The same, in the threads that hash and write leaves."""
    return await run_to_completion(
        asyncio.get_running_loop().run_in_executor(_workers, partial(call, *args, **kwargs))
    )
