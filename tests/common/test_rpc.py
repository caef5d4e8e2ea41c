"""RPC: many requests at a time, errors with their class, and no caller left waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from shoal_common.bus import subjects
from shoal_common.errors import BadMessage, Expired, Failed, NodeAway, NoRoom
from shoal_common.messages import Message
from shoal_common.rpc.request_reply import MAX_ASKED_AT_ONCE, Ask, Question, serve
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.waiting import eventually

Fresh = Callable[[str], str]


class Echo(Message):
    """Request and reply."""

    text: str


class GatedEndpoint:
    """Replies once its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = 0
        self.questions = {
            "echo": Question(Echo, self._echo),
            "refuse": Question(Echo, self._refuse),
            "fail": Question(Echo, self._fail),
            "huge": Question(Echo, self._huge),
        }

    async def _echo(self, question: Echo) -> Echo:
        self.asked += 1
        await self.gate.wait()
        return question

    async def _refuse(self, question: Echo) -> Echo:
        raise NoRoom("node-a lacks 7 bytes; free some", needed_bytes=7)

    async def _fail(self, question: Echo) -> Echo:
        raise ZeroDivisionError("a bug")

    async def _huge(self, question: Echo) -> Echo:
        return Echo(text="x" * (2 << 20))


@asynccontextmanager
async def serving(here: Joined, node: str, room: GatedEndpoint) -> AsyncIterator[asyncio.Event]:
    stopping = asyncio.Event()
    running = asyncio.create_task(serve(here.nats, "storage", node, room.questions, stopping))
    with suppress(NoRoom):  # an error is a reply
        await Ask(here.nats)("storage", node, "refuse", Echo(text=""), Echo, patience_s=5)
    try:
        yield stopping
    finally:
        stopping.set()
        await asyncio.wait_for(running, 10)


async def test_an_answer_comes_back_as_its_type(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), GatedEndpoint()):
        assert await Ask(here.nats)("storage", node, "echo", Echo(text="hé"), Echo) == Echo(text="hé")


async def test_an_error_crosses_with_its_class_message_and_details(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), GatedEndpoint()):
        ask = Ask(here.nats)
        with pytest.raises(NoRoom, match="lacks 7 bytes") as refusal:
            await ask("storage", node, "refuse", Echo(text=""), Echo)
        assert refusal.value.details == {"needed_bytes": 7}
        with pytest.raises(Failed, match="ZeroDivisionError"):
            await ask("storage", node, "fail", Echo(text=""), Echo)
        with pytest.raises(BadMessage, match="Echo"):
            await ask("storage", node, "echo", {"text": 7}, Echo)


async def test_no_responder_is_an_error_at_once_with_a_remedy(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        started_s = time.monotonic()
        with pytest.raises(NodeAway, match=r"storage of node nobody .* `shoal"):
            await Ask(here.nats)("storage", "nobody", "echo", Echo(text=""), Echo)
        assert time.monotonic() - started_s < 2


async def test_a_call_waits_for_a_service_that_is_restarting(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        node = fresh("node")
        asking = asyncio.create_task(Ask(here.nats)("storage", node, "echo", Echo(text="x"), Echo, patience_s=10))
        async with serving(here, node, GatedEndpoint()):
            assert await asking == Echo(text="x")


async def test_I7_an_answer_that_does_not_come_in_time_is_expired(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), room := GatedEndpoint()):
        room.gate.clear()
        with pytest.raises(Expired, match="echo"):
            await Ask(here.nats)("storage", node, "echo", Echo(text=""), Echo, deadline_s=0.2)
        room.gate.set()


async def test_many_rpc_calls_are_answered_at_once(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), room := GatedEndpoint()):
        room.gate.clear()
        texts = [str(i) for i in range(MAX_ASKED_AT_ONCE)]
        asking = [asyncio.create_task(Ask(here.nats)("storage", node, "echo", Echo(text=t), Echo)) for t in texts]

        async def all_asked() -> bool:
            return room.asked == len(texts)

        await eventually(all_asked, "all questions are being answered at the same time")
        room.gate.set()
        assert [e.text for e in await asyncio.gather(*asking)] == texts


async def test_the_answer_under_way_survives_stopping(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        async with serving(here, node := fresh("node"), room := GatedEndpoint()) as stopping:
            room.gate.clear()
            asking = asyncio.create_task(Ask(here.nats)("storage", node, "echo", Echo(text="last"), Echo))

            async def asked() -> bool:
                return room.asked == 1

            await eventually(asked, "the question has arrived")
            stopping.set()

            async def refused() -> bool:
                try:
                    await Ask(here.nats)("storage", node, "refuse", Echo(text="late"), Echo, deadline_s=1)
                except NodeAway:
                    return True
                except NoRoom:
                    return False  # it arrived before the endpoint was removed
                return False

            await eventually(refused, "a later asker is told at once that nobody is there")
            assert not asking.done()
            room.gate.set()
            assert await asking == Echo(text="last")
        with pytest.raises(NodeAway):
            await Ask(here.nats)("storage", node, "echo", Echo(text="later"), Echo)


async def test_an_unawaited_call_and_an_oversized_reply_are_harmless(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, serving(here, node := fresh("node"), GatedEndpoint()):
        await here.client.publish(subjects.question("storage", node, "echo"), b'{"text": "a plain nats pub"}')
        with pytest.raises(Failed, match="large"):
            await Ask(here.nats)("storage", node, "huge", Echo(text=""), Echo, deadline_s=5)
        assert await Ask(here.nats)("storage", node, "echo", Echo(text="x"), Echo) == Echo(text="x")


async def test_rpc_calls_are_answered_again_after_a_restart_of_nats(own_nats: NatsServer) -> None:
    async with joined(own_nats) as here, serving(here, "node-a", GatedEndpoint()):
        own_nats.restart()
        await here.nats.reconnects.wait_after(0)
        answer = await Ask(here.nats)("storage", "node-a", "echo", Echo(text="x"), Echo, deadline_s=10, patience_s=10)
        assert answer == Echo(text="x")
