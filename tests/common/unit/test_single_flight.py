"""Equal work that is asked for at the same time runs once, for all who wait."""

from __future__ import annotations

import asyncio

import pytest

from shoal_common.concurrency.single_flight import SingleFlight


class Work:
    """Counts its calls; each returns its number once it may end."""

    def __init__(self) -> None:
        self.started_count = 0
        self.cleaned_count = 0
        self.may_end, self.may_clean_up = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> int:
        self.started_count += 1
        number = self.started_count
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            await self.may_clean_up.wait()
            self.cleaned_count += 1
            raise
        return number


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_callers_share_one_call_and_the_next_calls_again() -> None:
    share, work = SingleFlight[int](), Work()
    callers = [asyncio.create_task(share("a", work)) for _ in range(3)]
    other = asyncio.create_task(share("b", work))
    await settle()
    assert work.started_count == 2
    work.may_end.set()
    assert await asyncio.gather(*callers) == [1, 1, 1]
    assert await other == 2
    assert await share("a", work) == 3


async def test_callers_share_the_exception() -> None:
    share = SingleFlight[int]()

    async def fails() -> int:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    results = await asyncio.gather(share("a", fails), share("a", fails), return_exceptions=True)
    assert [type(e) for e in results] == [ZeroDivisionError] * 2


async def test_a_cancelled_caller_affects_no_other() -> None:
    share, work = SingleFlight[int](), Work()
    first, second = asyncio.create_task(share("a", work)), asyncio.create_task(share("a", work))
    await settle()
    first.cancel()
    await settle()
    assert first.cancelled() and not second.done()
    work.may_end.set()
    assert await second == 1


async def test_work_that_all_left_is_cancelled_before_it_runs_again() -> None:
    share, work = SingleFlight[int](), Work()
    callers = [asyncio.create_task(share("a", work)) for _ in range(2)]
    await settle()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    late = asyncio.create_task(share("a", work))
    await settle()
    assert work.started_count == 1, "the first call still cleans up"
    work.may_clean_up.set()
    await settle()
    assert (work.cleaned_count, work.started_count) == (1, 2)
    work.may_end.set()
    assert await late == 2


async def test_work_that_cancels_itself_ends_for_its_callers() -> None:
    share = SingleFlight[int]()

    async def cancels() -> int:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await share("a", cancels)
    assert not share._flights
