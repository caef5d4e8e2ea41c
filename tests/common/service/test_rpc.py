"""RPC: many requests at a time, errors with their class, and no caller left waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from shoal_common.bus import subjects
from shoal_common.errors import BadMessage, Expired, InternalError, NodeDown, NoMemory
from shoal_common.messages import WireStruct
from shoal_common.rpc.request_reply import MAX_CONCURRENT_REQUESTS, RpcClient, RpcEndpoint, serve
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.waiting import eventually


class Echo(WireStruct):
    """Request and reply."""

    text: str


class GatedEndpoint:
    """Replies once its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0
        self.questions = {
            "echo": RpcEndpoint(Echo, self._echo),
            "refuse": RpcEndpoint(Echo, self._refuse),
            "fail": RpcEndpoint(Echo, self._fail),
            "huge": RpcEndpoint(Echo, self._huge),
        }

    async def _echo(self, question: Echo) -> Echo:
        self.asked += 1
        await self.gate.wait()
        return question

    async def _refuse(self, question: Echo) -> Echo:
        raise NoMemory("node-a lacks 7 bytes; free some", needed_bytes=7)

    async def _fail(self, question: Echo) -> Echo:
        raise ZeroDivisionError("a bug")

    async def _huge(self, question: Echo) -> Echo:
        return Echo(text="x" * (2 << 20))


@asynccontextmanager
async def serving(here: Joined, node: str, room: GatedEndpoint) -> AsyncIterator[asyncio.Event]:
    stopping = asyncio.Event()
    running = asyncio.create_task(serve(here.nats, "storage", node, room.questions, stopping))
    with suppress(NoMemory):  # an error is a reply
        await RpcClient(here.nats)("storage", node, "refuse", Echo(text=""), Echo, restart_wait_s=5)
    try:
        yield stopping
    finally:
        stopping.set()
        await asyncio.wait_for(running, 10)


async def test_an_answer_comes_back_as_its_type(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), GatedEndpoint()):
        assert await RpcClient(here.nats)("storage", node, "echo", Echo(text="hé"), Echo) == Echo(text="hé")


async def test_an_error_crosses_with_its_class_message_and_details(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), GatedEndpoint()):
        ask = RpcClient(here.nats)
        with pytest.raises(NoMemory, match="lacks 7 bytes") as refusal:
            await ask("storage", node, "refuse", Echo(text=""), Echo)
        assert refusal.value.details == {"needed_bytes": 7}
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            await ask("storage", node, "fail", Echo(text=""), Echo)
        with pytest.raises(BadMessage, match="Echo"):
            await ask("storage", node, "echo", {"text": 7}, Echo)


async def test_no_responder_is_an_error_at_once_with_a_remedy(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        started_s = time.monotonic()
        with pytest.raises(NodeDown, match=r"storage of node nobody .* `shoal"):
            await RpcClient(here.nats)("storage", "nobody", "echo", Echo(text=""), Echo)
        assert time.monotonic() - started_s < 2


async def test_a_call_waits_for_a_service_that_is_restarting(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        node = fresh("node")
        asking = asyncio.create_task(
            RpcClient(here.nats)("storage", node, "echo", Echo(text="x"), Echo, restart_wait_s=10)
        )
        async with serving(here, node, GatedEndpoint()):
            assert await asking == Echo(text="x")


async def test_I7_an_answer_that_does_not_come_in_time_is_expired(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), room := GatedEndpoint()):
        room.gate.clear()
        with pytest.raises(Expired, match="echo"):
            await RpcClient(here.nats)("storage", node, "echo", Echo(text=""), Echo, deadline_s=0.2)
        room.gate.set()


async def test_many_rpc_calls_are_answered_at_once(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), room := GatedEndpoint()):
        room.gate.clear()
        texts = [str(i) for i in range(MAX_CONCURRENT_REQUESTS)]
        asking = [
            asyncio.create_task(RpcClient(here.nats)("storage", node, "echo", Echo(text=t), Echo)) for t in texts
        ]

        async def all_asked() -> bool:
            return room.asked == len(texts)

        await eventually(all_asked, "all questions are being answered at the same time")
        room.gate.set()
        assert [e.text for e in await asyncio.gather(*asking)] == texts


async def test_the_answer_under_way_survives_stopping(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        async with serving(here, node := fresh("node"), room := GatedEndpoint()) as stopping:
            room.gate.clear()
            asking = asyncio.create_task(RpcClient(here.nats)("storage", node, "echo", Echo(text="last"), Echo))

            async def asked() -> bool:
                return room.asked == 1

            await eventually(asked, "the question has arrived")
            stopping.set()

            async def refused() -> bool:
                try:
                    await RpcClient(here.nats)("storage", node, "refuse", Echo(text="late"), Echo, deadline_s=1)
                except NodeDown:
                    return True
                except NoMemory:
                    return False  # it arrived before the endpoint was removed
                return False

            await eventually(refused, "a later asker is told at once that nobody is there")
            assert not asking.done()
            room.gate.set()
            assert await asking == Echo(text="last")
        with pytest.raises(NodeDown):
            await RpcClient(here.nats)("storage", node, "echo", Echo(text="later"), Echo)


async def test_an_unawaited_call_and_an_oversized_reply_are_harmless(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), GatedEndpoint()):
        await here.client.publish(subjects.rpc("storage", node, "echo"), b'{"text": "a plain nats pub"}')
        with pytest.raises(InternalError, match="large"):
            await RpcClient(here.nats)("storage", node, "huge", Echo(text=""), Echo, deadline_s=5)
        assert await RpcClient(here.nats)("storage", node, "echo", Echo(text="x"), Echo) == Echo(text="x")


async def test_rpc_calls_are_answered_again_after_a_restart_of_nats(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here, serving(here, "node-a", GatedEndpoint()):
        own_nats.restart()
        await here.nats.reconnects.wait_after(0)
        answer = await RpcClient(here.nats)(
            "storage", "node-a", "echo", Echo(text="x"), Echo, deadline_s=10, restart_wait_s=10
        )
        assert answer == Echo(text="x")
