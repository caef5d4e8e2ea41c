"""A cancelled task ends, also if the cancellation arrives together with the reply it waits for."""

from __future__ import annotations

import asyncio

import pytest

from shoal_common.cancellation import cancel_and_wait, wait_for
from tests.harness.nats import NatsServer, joined


async def test_cancel_and_wait_ends_a_task_whose_cancel_meets_a_result() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    received: list[str] = []

    async def asks_and_goes_on() -> None:
        received.append(await asyncio.wait_for(answer, 60))
        await asyncio.Event().wait()

    asking = asyncio.create_task(asks_and_goes_on())
    await asyncio.sleep(0)
    answer.set_result("in the same moment")
    await asyncio.wait_for(cancel_and_wait(asking), 5)
    assert asking.cancelled()


async def test_several_end_together_and_what_one_raised_is_its_owners() -> None:
    async def fails_at_the_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ZeroDivisionError

    waiting, failing = asyncio.create_task(asyncio.Event().wait()), asyncio.create_task(fails_at_the_end())
    await asyncio.sleep(0)
    await cancel_and_wait(waiting, failing)
    assert waiting.cancelled()
    assert isinstance(failing.exception(), ZeroDivisionError)


async def test_nothing_to_end_is_no_wait() -> None:
    done = asyncio.create_task(asyncio.sleep(0))
    await done
    await cancel_and_wait()
    await cancel_and_wait(done)


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


async def test_whoever_is_connected_to_nats_loses_no_cancellation(nats: NatsServer) -> None:
    async with joined(nats):
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asking = asyncio.create_task(asyncio.wait_for(answer, 60))
        await asyncio.sleep(0)
        answer.set_result("in the same moment")
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
