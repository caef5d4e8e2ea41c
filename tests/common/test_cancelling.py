"""A task that is to end ends, also when its cancellation meets the answer it was waiting for."""

from __future__ import annotations

import asyncio

from shoal_common.cancelling import ended


async def test_a_task_whose_cancellation_meets_its_answer_is_ended_all_the_same() -> None:
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    heard: list[str] = []

    async def asks_and_goes_on() -> None:
        heard.append(await asyncio.wait_for(answer, 60))
        await asyncio.Event().wait()

    asking = asyncio.create_task(asks_and_goes_on())
    await asyncio.sleep(0)
    answer.set_result("in the same moment")
    await asyncio.wait_for(ended(asking), 5)
    assert asking.cancelled()


async def test_several_end_together_and_what_one_raised_is_its_owners() -> None:
    async def fails_at_the_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ZeroDivisionError

    waiting, failing = asyncio.create_task(asyncio.Event().wait()), asyncio.create_task(fails_at_the_end())
    await asyncio.sleep(0)
    await ended(waiting, failing)
    assert waiting.cancelled()
    assert isinstance(failing.exception(), ZeroDivisionError)


async def test_nothing_to_end_is_no_wait() -> None:
    done = asyncio.create_task(asyncio.sleep(0))
    await done
    await ended()
    await ended(done)
