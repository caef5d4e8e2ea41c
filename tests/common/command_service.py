"""A test's command worker, and how to send it commands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from nats.errors import Error as NatsError

from shoal_common.bus import subjects
from shoal_common.bus.events import EventEmitter
from shoal_common.messages import decode
from shoal_common.messages.envelope import Outcome
from shoal_common.rpc.command_worker import CommandHandler, CommandWorker
from tests.harness.nats import Joined
from tests.harness.waiting import eventually

SERVICE = "storage"
ASK_DEADLINE_S = 45.0


@asynccontextmanager
async def working(here: Joined, node: str, verbs: Mapping[str, CommandHandler]) -> AsyncIterator[asyncio.Event]:
    """Run a worker of `node` while the body runs. Yields the event that stops it."""
    stopping = asyncio.Event()
    events = EventEmitter(here.nats, SERVICE, node)
    worker = CommandWorker(here.nats, here.buckets, events, SERVICE, node, verbs)
    running = asyncio.create_task(worker.run(node, stopping))
    try:
        await eventually(lambda: pulling(here, node), "the worker pulls commands")
        yield stopping
    finally:
        stopping.set()
        await running


async def pulling(here: Joined, node: str) -> bool:
    """Return whether a worker of this node waits for commands."""
    try:
        return bool((await here.client.jetstream(timeout=1).consumer_info("CMD", f"{SERVICE}-{node}")).num_waiting)
    except NatsError:
        return False  # the consumer, or NATS, is not there yet


def subject(node: str, verb: str) -> str:
    """Return the subject of a command for the worker."""
    return subjects.command(SERVICE, node, verb)


async def ask(here: Joined, node: str, verb: str, body: bytes, identity: str = "") -> Outcome:
    """Do what `nats req` does: a core request on the command's subject; return the first reply."""
    headers = {"Nats-Msg-Id": identity} if identity else None
    reply = await here.client.request(subject(node, verb), body, timeout=ASK_DEADLINE_S, headers=headers)
    return decode(reply.data, Outcome)


async def nothing_left(here: Joined, node: str) -> None:
    """Return once no command of this node is in the queue, running or not."""

    async def empty() -> bool:
        info = await here.js.stream_info("CMD", subjects_filter=subject(node, "*"))
        return not info.state.subjects

    await eventually(empty, f"the queue of {node} is empty")
