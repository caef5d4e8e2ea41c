"""A task that is cancelled while it waits for NATS ends, though it is cancelled once."""

from __future__ import annotations

import ast
import asyncio
import inspect
import random
import sys
from pathlib import Path

import nats as nats_py
import pytest
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from shoal_common.bus.nats_client import WAITING_MODULES, NatsClient, loses_cancellations, patch_wait_for, wait_for
from tests.harness.nats import NatsServer, joined

NATS_PY = Path(nats_py.__file__).parent
STRESS_COUNT = 2000
"""Without the patched `wait_for` of Python 3.11, some of this many requests lose their cancellation."""


async def test_a_cancellation_that_meets_the_answer_is_not_lost() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    asking = asyncio.create_task(wait_for(answer, 60))
    await asyncio.sleep(0)
    answer.set_result("in the same moment")
    asking.cancel()
    await asyncio.wait({asking})
    assert asking.cancelled()


async def test_a_wait_ends_with_the_answer_or_with_its_deadline() -> None:
    async def answer() -> str:
        return "yes"

    assert await wait_for(answer(), 60) == await wait_for(answer(), None) == "yes"
    for deadline_s in (0.01, 0, -1):
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await wait_for(never, deadline_s)
        assert never.cancelled()
    there: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    there.set_result(7)
    assert await wait_for(there, 0) == 7


def test_only_pythons_before_3_12_lose_cancellations() -> None:
    assert [version for version in [(3, 11), (3, 12), (3, 13), (4, 0)] if loses_cancellations(version)] == [(3, 11)]


def test_the_mended_wait_for_is_nats_pys_alone() -> None:
    patch_wait_for()
    patch_wait_for()
    assert asyncio.wait_for.__module__ == "asyncio.tasks"
    expected = wait_for if loses_cancellations(sys.version_info[:2]) else asyncio.wait_for
    for module in WAITING_MODULES:
        assert vars(module)["asyncio"].wait_for is expected
        assert vars(module)["asyncio"].CancelledError is asyncio.CancelledError


def test_nats_py_waits_only_where_it_is_mended() -> None:
    """Fails when a new nats-py calls `wait_for` from elsewhere, or by another name."""
    patched = {str(Path(inspect.getfile(module)).relative_to(NATS_PY)) for module in WAITING_MODULES}
    waiting = set()
    for path in NATS_PY.rglob("*.py"):
        tree = ast.parse(path.read_text())
        top = {alias.asname or alias.name for n in tree.body if isinstance(n, ast.Import) for alias in n.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert "wait_for" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.Import) and node not in tree.body:
                assert "asyncio" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.Attribute) and node.attr == "wait_for":
                assert isinstance(node.value, ast.Name) and node.value.id == "asyncio" and "asyncio" in top, path
                waiting.add(str(path.relative_to(NATS_PY)))
    assert waiting == patched


async def test_cancelled_requests_end_whenever_the_reply_arrives(nats: NatsServer) -> None:
    cancelled_at_random = random.Random(14)
    async with joined(nats) as here:
        subject = here.client.new_inbox()

        async def reply(message: object) -> None:
            await message.respond(b"")  # type: ignore[attr-defined]  # nats-py's Msg

        await here.client.subscribe(subject, cb=reply)

        async def asks_for_ever() -> None:
            while True:
                await here.client.request(subject, timeout=30)

        for _ in range(STRESS_COUNT):
            asking = asyncio.create_task(asks_for_ever())
            for _ in range(cancelled_at_random.randrange(12)):
                await asyncio.sleep(0)
            asking.cancel()
            ended, _ = await asyncio.wait({asking}, timeout=10)
            assert ended and asking.cancelled()


async def test_a_cancelled_flush_of_a_full_buffer_ends(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    draining, may_drain = asyncio.Event(), asyncio.Event()
    drain = TcpTransport.drain

    async def drains_late(transport: TcpTransport) -> None:
        draining.set()
        await may_drain.wait()
        await drain(transport)  # type: ignore[no-untyped-call]  # nats-py's

    async with joined(nats) as here:

        async def publishes_for_ever() -> None:
            while True:
                await here.client.publish("full", b"more than fits")

        monkeypatch.setattr(TcpTransport, "drain", drains_late)
        monkeypatch.setattr(here.client, "_max_pending_size", 1)
        publishing = asyncio.create_task(publishes_for_ever())
        await draining.wait()
        publishing.cancel()
        ended, _ = await asyncio.wait({publishing}, timeout=10)
        may_drain.set()
        assert ended and publishing.cancelled()


def test_the_overridden_flush_exists_in_nats_py() -> None:
    assert inspect.iscoroutinefunction(Client._flush_pending)
    assert inspect.signature(Client._flush_pending) == inspect.signature(NatsClient._flush_pending)
