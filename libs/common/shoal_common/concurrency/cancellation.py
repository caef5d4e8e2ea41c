"""Cancellation that lets a task's clean-up run to its end.

A task is cancelled once: a second cancellation would interrupt the `finally` that the first one started. Once is
enough only if nothing swallows it: `bus/nats_client.py` closes the places where nats-py does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

CLEANUP_DEADLINE_S = 5.0
"""How long the clean-up of cancelled tasks may take."""


async def cancel_and_wait(*tasks: asyncio.Future[Any], deadline_s: float = CLEANUP_DEADLINE_S) -> None:
    """Cancel tasks once, and return when they have ended. An exception stays in its task, for its owner.

    A caller that is cancelled meanwhile waits all the same. Raises RuntimeError, with the tasks that still run after
    `deadline_s`.
    """
    running = {task for task in tasks if not task.done()}
    if not running:
        return
    for task in running:
        task.cancel()
    try:
        await run_to_completion(asyncio.wait(running, timeout=deadline_s))
    finally:
        if stuck := [task for task in running if not task.done()]:
            raise RuntimeError(f"cancelled {deadline_s:g} s ago and still running: {describe(*stuck)}")


async def run_to_completion(work: Awaitable[T]) -> T:
    """Return the result of work that must not be interrupted; a caller that is cancelled meanwhile waits.

    The cancellation is raised afterwards, in place of the result.
    """
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({working})
        if not working.cancelled():
            working.exception()  # retrieved: the cancellation is raised in its place
        raise


class DetachedTasks:
    """Tasks that complete once begun, also when the command that started them passes its deadline."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of the work. A caller that is cancelled leaves at once, and the work goes on."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def wait_ended(self) -> None:
        """Return when no task is left."""
        while self._running:
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: maybe its caller has left


def describe(*tasks: asyncio.Future[Any]) -> str:
    """Return what tasks are and where they wait: `Task-7 run_forever (worker.py:31)`."""
    return ", ".join(sorted(map(_describe, tasks)))


def _describe(task: asyncio.Future[Any]) -> str:
    if not isinstance(task, asyncio.Task):
        return repr(task)
    name = f"{task.get_name()} {getattr(task.get_coro(), '__qualname__', '')}"
    frames = task.get_stack(limit=1)
    return f"{name} ({frames[0].f_code.co_filename}:{frames[0].f_lineno})" if frames else name
