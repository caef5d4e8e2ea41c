"""A cancelled task is cancelled once, and its clean-up runs to its end."""

from __future__ import annotations

import asyncio

import pytest

from shoal_common.concurrency.cancellation import DetachedTasks, cancel_and_wait, run_to_completion


async def waits_for_ever(started: asyncio.Event) -> None:
    started.set()
    await asyncio.Event().wait()


async def test_clean_up_of_more_than_a_second_runs_to_its_end() -> None:
    started, cleaned = asyncio.Event(), asyncio.Event()

    async def works() -> None:
        try:
            await waits_for_ever(started)
        finally:
            await asyncio.sleep(1.2)  # longer than the old rule's second cancellation, which came after 0.5 s
            cleaned.set()

    working = asyncio.create_task(works())
    await started.wait()
    await cancel_and_wait(working)
    assert working.cancelled() and cleaned.is_set()


async def test_a_cancelled_caller_still_waits_for_the_clean_up() -> None:
    started, cleaning, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def works() -> None:
        try:
            await waits_for_ever(started)
        finally:
            cleaning.set()
            await may_end.wait()

    working = asyncio.create_task(works())
    await started.wait()
    ending = asyncio.create_task(cancel_and_wait(working))
    await cleaning.wait()
    for _ in range(3):
        ending.cancel()
        await asyncio.sleep(0)
    assert not ending.done() and not working.done()
    may_end.set()
    await asyncio.wait({ending})
    assert ending.cancelled() and working.cancelled()


async def test_a_task_that_does_not_end_is_named() -> None:
    started, may_end = asyncio.Event(), asyncio.Event()

    async def ignores_cancellation() -> None:
        try:
            await waits_for_ever(started)
        except asyncio.CancelledError:
            await may_end.wait()

    stubborn = asyncio.create_task(ignores_cancellation(), name="stubborn")
    await started.wait()
    with pytest.raises(RuntimeError, match=r"stubborn .*ignores_cancellation \(.*test_cancellation\.py:\d+\)"):
        await cancel_and_wait(stubborn, deadline_s=0.01)
    assert stubborn.cancelling() == 1, "its clean-up is not interrupted"
    may_end.set()
    await stubborn


async def test_several_end_together_and_what_one_raised_is_its_owners() -> None:
    started = [asyncio.Event(), asyncio.Event()]

    async def fails_at_the_end() -> None:
        try:
            await waits_for_ever(started[1])
        finally:
            raise ZeroDivisionError

    waiting, failing = asyncio.create_task(waits_for_ever(started[0])), asyncio.create_task(fails_at_the_end())
    await asyncio.gather(*(event.wait() for event in started))
    await cancel_and_wait(waiting, failing)
    assert waiting.cancelled()
    assert isinstance(failing.exception(), ZeroDivisionError)


async def test_a_task_that_has_ended_keeps_its_result() -> None:
    done = asyncio.create_task(asyncio.sleep(0, "result"))
    await done
    await cancel_and_wait(done)
    await cancel_and_wait()
    assert done.result() == "result"


async def test_work_that_must_complete_does_and_then_its_caller_ends() -> None:
    may_end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    caller = asyncio.create_task(run_to_completion(may_end))
    await asyncio.sleep(0)
    for _ in range(3):
        caller.cancel()
        await asyncio.sleep(0)
    assert not caller.done() and not may_end.done()
    may_end.set_result("done")
    await asyncio.wait({caller})
    assert caller.cancelled()


async def test_work_that_must_complete_returns_or_raises_to_its_caller() -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    assert await run_to_completion(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ZeroDivisionError):
        await run_to_completion(fails())


async def test_detached_work_goes_on_when_its_caller_leaves() -> None:
    detached, may_end, ended = DetachedTasks(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await may_end.wait()
        ended.set()

    caller = asyncio.create_task(detached.run(work()))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait({caller})
    assert caller.cancelled() and not ended.is_set()
    waiting = asyncio.create_task(detached.wait_ended())
    await asyncio.sleep(0)
    assert not waiting.done()
    may_end.set()
    await waiting
    assert ended.is_set()
