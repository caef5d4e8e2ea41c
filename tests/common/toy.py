"""A service for tests: everything a service does, and as little of it as can be.

TOY says how it misbehaves: `crash` (a task of it fails once it is ready), `deaf` (it never stops by itself).
TOY_STOP_DEADLINE_S and TOY_ACK_WAIT_S shorten what a test would otherwise wait for.
Its command `work` leaves a file and never ends; when the file is there already it ends well. So the first delivery
can be killed in the middle, and the second is told from it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from shoal_common import commands, service
from shoal_common.commands import Verb
from shoal_common.messages import Message
from shoal_common.messages.commands import Command
from shoal_common.questions import Question


class Work(Command, kw_only=True):
    """Work whose first attempt never ends."""

    path: str


class Echo(Message):
    """Asked and answered."""

    text: str


def _left(path: Path) -> bool:
    """Whether an earlier attempt left its file; now it is there."""
    there = path.exists()
    path.touch()
    return there


async def _work(command: Work, identity: str) -> object:
    if await asyncio.to_thread(_left, Path(command.path)):
        return {"identity": identity}
    await asyncio.Event().wait()
    return {}


async def _echo(question: Echo) -> Echo:
    return question


async def _crash() -> None:
    raise ZeroDivisionError("one task failed\non two lines")


async def run(context: service.Context) -> None:
    """The service."""
    mode = context.environ.get("TOY", "")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(context.serve({"echo": Question(Echo, _echo)}))
        tasks.create_task(context.work({"work": Verb(Work, _work, 60.0)}))
        context.ready()
        if mode == "crash":
            tasks.create_task(_crash())
        if mode == "deaf":
            await asyncio.Event().wait()
        await context.stopping.wait()


if __name__ == "__main__":
    service.STOP_DEADLINE_S = float(os.environ.get("TOY_STOP_DEADLINE_S") or service.STOP_DEADLINE_S)
    commands.ACK_WAIT_S = float(os.environ.get("TOY_ACK_WAIT_S") or commands.ACK_WAIT_S)
    sys.exit(service.main("storage", run))
