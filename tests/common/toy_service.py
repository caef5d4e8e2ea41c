"""A minimal service for tests.

TOY makes it misbehave: `crash` (one of its tasks fails once it is ready), `deaf` (it never stops by itself), `tidy`
(a background task cleans up for longer than a second), `stuck` (it is deaf to a cancellation too), `blocked` (its
shared threads never return).
TOY_STOP_DEADLINE_S, TOY_CLEANUP_DEADLINE_S, TOY_ACK_WAIT_S and TOY_BLOCKED_TIMEOUT_S shorten what a test would
otherwise wait for.
Its command `work` creates a file and never ends; if the file exists already, it succeeds. So the first delivery can
be killed in the middle, and told from the second. Its command `save` completes once begun, in more than a second.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from shoal_common import service
from shoal_common.concurrency import cancellation
from shoal_common.host import sd_notify
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct
from shoal_common.messages.envelope import Command
from shoal_common.rpc import command_worker
from shoal_common.rpc.command_worker import CommandHandler
from shoal_common.rpc.request_reply import RpcEndpoint

log = StructuredLogger("toy")


class Work(Command, kw_only=True):
    """A command whose first attempt never ends."""

    path: str


class Echo(WireStruct):
    """Request and reply."""

    text: str


def _left(path: Path) -> bool:
    """Return whether an earlier attempt created the file; create it."""
    there = path.exists()
    path.touch()
    return there


async def _work(command: Work, identity: str) -> object:
    if await asyncio.to_thread(_left, Path(command.path)):
        return {"identity": identity}
    await asyncio.Event().wait()
    return {}


async def _save() -> object:
    log.info("saving")
    await asyncio.sleep(1.2)
    log.info("saved")
    return {}


async def _echo(question: Echo) -> Echo:
    return question


async def _crash() -> None:
    raise ZeroDivisionError("one task failed\non two lines")


async def _tidy_up_at_the_end() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        log.info("cleaning up")
        await asyncio.sleep(1.2)
        log.info("cleaned up")


async def _never_end() -> None:
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def run(context: service.ServiceContext) -> None:
    """Run the service."""
    mode = context.environ.get("TOY", "")

    async def save(_: Command, __: str) -> object:
        return await context.detached.run(_save())

    verbs = {"work": CommandHandler(Work, _work, 60.0), "save": CommandHandler(Command, save, 60.0)}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(context.serve({"echo": RpcEndpoint(Echo, _echo)}))
        tasks.create_task(context.run_commands(verbs))
        context.ready()
        if mode == "crash":
            tasks.create_task(_crash())
        if mode == "tidy":
            context.run_in_background(tasks, _tidy_up_at_the_end())
        if mode == "stuck":
            await _never_end()
        if mode == "blocked":
            for _ in range(64):
                tasks.create_task(asyncio.to_thread(threading.Event().wait))
        if mode == "deaf":
            await asyncio.Event().wait()
        await context.stopping.wait()


if __name__ == "__main__":
    service.STOP_DEADLINE_S = float(os.environ.get("TOY_STOP_DEADLINE_S") or service.STOP_DEADLINE_S)
    cleanup_deadline_s = os.environ.get("TOY_CLEANUP_DEADLINE_S")
    cancellation.CLEANUP_DEADLINE_S = float(cleanup_deadline_s or cancellation.CLEANUP_DEADLINE_S)
    command_worker.ACK_WAIT_S = float(os.environ.get("TOY_ACK_WAIT_S") or command_worker.ACK_WAIT_S)
    sd_notify.BLOCKED_TIMEOUT_S = float(os.environ.get("TOY_BLOCKED_TIMEOUT_S") or sd_notify.BLOCKED_TIMEOUT_S)
    sys.exit(service.main("storage", run))
