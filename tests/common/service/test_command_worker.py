"""Commands: each runs once, and its sender gets the outcome."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from nats.aio.msg import Msg

from shoal_common.bus import subjects
from shoal_common.bus.keys import done_key
from shoal_common.errors import NotFound
from shoal_common.messages.envelope import Command, Outcome
from shoal_common.rpc.command_worker import MAX_CONCURRENT_COMMANDS, CommandHandler
from tests.common.command_service import SERVICE, ask, nothing_left, subject, working
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.waiting import eventually


class Work(Command, kw_only=True):
    """The command of these tests' worker."""

    what: str = ""


class Bench:
    """A handler that records its calls and waits at a closed gate."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.verbs = {
            "work": CommandHandler(Work, self._work, 30.0),
            "fail": CommandHandler(Work, self._fail, 30.0),
            "refuse": CommandHandler(Work, self._refuse, 30.0),
        }

    async def _work(self, command: Work, identity: str) -> dict[str, Any]:
        self.begun.append(command.what)
        await self.gate.wait()
        return {"did": command.what, "identity": identity}

    async def _fail(self, command: Work, identity: str) -> None:
        raise ZeroDivisionError("a bug")

    async def _refuse(self, command: Work, identity: str) -> None:
        raise NotFound("there is no such fish; catch one", pond="north")


async def kept(here: Joined, identity: str) -> Outcome:
    """Return the outcome in `done`."""
    return await eventually(lambda: here.buckets.done.get_as(done_key(identity), Outcome), f"{identity} is done")


async def test_the_first_reply_is_the_outcome_with_and_without_an_id(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), (bench := Bench()).verbs):
        by_header = await ask(here, node, "work", b'{"what": "one"}', identity := fresh("id"))
        assert (by_header.ok, by_header.id, by_header.node) == (True, identity, node)
        assert by_header.result == {"did": "one", "identity": identity}
        in_body = await ask(here, node, "work", json.dumps({"what": "two", "id": fresh("id")}).encode())
        assert in_body.ok and in_body.result["did"] == "two"
        without = await ask(here, node, "work", b'{"what": "three"}')
        assert without.ok and without.id.startswith("cmd-")
        for outcome in (by_header, in_body, without):
            assert await kept(here, outcome.id) == outcome
        assert bench.begun == ["one", "two", "three"]
        await nothing_left(here, node)


async def test_a_command_without_a_reply_runs_and_keeps_its_outcome(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), Bench().verbs):
        body = json.dumps({"what": "quiet", "id": (identity := fresh("id"))}).encode()
        await here.client.publish(subject(node, "work"), body)
        assert (await kept(here, identity)).ok


async def test_a_command_sent_while_the_service_is_down_runs_later(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        node, identity = fresh("node"), fresh("id")
        await here.client.publish(subject(node, "work"), b'{"what": "early"}', headers={"Nats-Msg-Id": identity})
        await here.client.flush()
        async with working(here, node, Bench().verbs):
            assert (await kept(here, identity)).result["did"] == "early"


@pytest.mark.parametrize("by_header", [True, False])
async def test_I5_the_same_id_twice_runs_once_and_both_get_the_outcome(
    nats: NatsServer, fresh: Fresh, by_header: bool
) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), (bench := Bench()).verbs):
        identity = fresh("id")
        body = json.dumps({"what": "once"} if by_header else {"what": "once", "id": identity}).encode()
        header = identity if by_header else ""
        bench.gate.clear()
        together = [asyncio.create_task(ask(here, node, "work", body, header)) for _ in range(2)]

        async def begun() -> bool:
            return bool(bench.begun)

        await eventually(begun, "the work has begun")
        bench.gate.set()
        first, second = await asyncio.gather(*together)
        later = await ask(here, node, "work", body, header)
        assert first == second == later
        assert first.ok and first.id == identity
        assert bench.begun == ["once"]
        await nothing_left(here, node)


async def test_equal_commands_without_an_id_run_twice_and_both_reply(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), (bench := Bench()).verbs):
        outcomes = await asyncio.gather(*(ask(here, node, "work", b'{"what": "same"}') for _ in range(5)))
        assert all(o.ok for o in outcomes)
        await nothing_left(here, node)
        assert bench.begun == ["same"] * 5


async def test_many_commands_at_once_are_all_done(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), Bench().verbs):
        bodies = [json.dumps({"what": str(i)}).encode() for i in range(MAX_CONCURRENT_COMMANDS + 100)]
        outcomes = await asyncio.gather(*(ask(here, node, "work", b) for b in bodies))
        assert [o.result["did"] for o in outcomes] == [str(i) for i in range(len(bodies))]


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[]", b'{"what": 7}', b"not json at all"])
async def test_a_malformed_command_is_answered_bad_message_and_dropped(
    nats: NatsServer, fresh: Fresh, body: bytes
) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), (bench := Bench()).verbs):
        events = await here.client.subscribe(subjects.event(SERVICE, node, "rejected"))
        outcome = await ask(here, node, "work", body)
        assert not outcome.ok
        assert outcome.error is not None and outcome.error.code == "bad_message"
        event = json.loads((await events.next_msg(5)).data)
        assert event["subject"] == subject(node, "work") and event["reason"]
        await nothing_left(here, node)
        assert bench.begun == []
        assert (await ask(here, node, "work", b'{"what": "after"}')).ok


async def test_an_unknown_verb_ends_naming_the_verbs_there_are(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), Bench().verbs):
        outcome = await ask(here, node, "dance", b"{}")
        assert outcome.error is not None and outcome.error.code == "bad_message"
        assert "dance" in outcome.error.message and "work" in outcome.error.message
        await nothing_left(here, node)


async def test_an_id_that_is_none_is_not_used_as_a_key(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), Bench().verbs):
        outcome = await ask(here, node, "work", b'{"what": "x"}', "../../etc *.>")
        assert outcome.ok and outcome.id.startswith("cmd-")


async def test_a_handlers_refusal_reaches_the_sender_verbatim(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), Bench().verbs):
        outcome = await ask(here, node, "refuse", b"{}")
        assert outcome.error is not None
        assert (outcome.error.code, outcome.error.details) == ("not_found", {"pond": "north"})
        assert outcome.error.message == "there is no such fish; catch one"


async def test_a_bug_in_a_handler_is_an_outcome_and_the_worker_goes_on(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), Bench().verbs):
        outcome = await ask(here, node, "fail", b"{}")
        assert outcome.error is not None and outcome.error.code == "failed"
        assert "ZeroDivisionError" in outcome.error.message
        assert (await ask(here, node, "work", b"{}")).ok
        await nothing_left(here, node)


async def test_I7_a_command_past_its_deadline_ends_as_expired(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), (bench := Bench()).verbs):
        bench.gate.clear()
        slow = await ask(here, node, "work", b'{"what": "slow", "deadline_s": 0.3}')
        assert slow.error is not None and slow.error.code == "expired"
        assert bench.begun == ["slow"]
        late = await ask(here, node, "work", b'{"what": "late", "deadline_s": 0.000001}')
        assert late.error is not None and late.error.code == "expired"
        assert bench.begun == ["slow"]  # a command that expired in the queue is not started


async def test_I6_stopping_hands_unfinished_commands_to_the_next(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        node, first, second = fresh("node"), Bench(), Bench()
        first.gate.clear()
        identities = [fresh("id") for _ in range(3)]
        async with working(here, node, first.verbs):
            for identity in identities:
                body = json.dumps({"what": identity}).encode()
                await here.client.publish(subject(node, "work"), body, headers={"Nats-Msg-Id": identity})

            async def begun() -> bool:
                return len(first.begun) == 3

            await eventually(begun, "all are being worked on")
        async with asyncio.timeout(12), working(here, node, second.verbs):
            for identity in identities:
                assert (await kept(here, identity)).ok
        assert sorted(second.begun) == sorted(identities)


async def test_a_foreign_message_on_the_command_subject_is_harmless(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), Bench().verbs):
        deep = f"shoal.v1.cmd.{SERVICE}.{node}.a.b.c"
        await here.client.publish(deep, b"x", reply="_INBOX.nobody")
        assert (await ask(here, node, "work", b"{}")).ok


async def test_I7_waiters_for_one_unanswered_command_are_bounded(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here, working(here, node := fresh("node"), (bench := Bench()).verbs):
        bench.gate.clear()
        answers: asyncio.Queue[Msg] = asyncio.Queue()
        inbox = here.client.new_inbox()
        await here.client.subscribe(inbox, cb=answers.put)
        for _ in range(300):
            await here.client.publish(subject(node, "work"), b"{}", reply=inbox, headers={"Nats-Msg-Id": node})
        assert not (await ask(here, node, "refuse", b"{}")).ok  # answered after all of those were recorded
        bench.gate.set()
        assert (await kept(here, node)).ok
        assert not (await ask(here, node, "refuse", b"{}")).ok  # and after their answers were sent
        assert 0 < answers.qsize() <= 64
