"""Those who wait for a change hear of it, whenever they begin to wait."""

from __future__ import annotations

import asyncio

from shoal_common.concurrency.notifier import Notifier


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_change_wakes_all_who_wait_in_their_order() -> None:
    notifier, woken = Notifier(), list[int]()

    async def wait(number: int) -> None:
        await notifier.wait_after(0)
        woken.append(number)

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(wait(number))
        await settle()
        assert not woken
        notifier.notify()
    assert woken == [0, 1, 2, 3]


async def test_a_change_before_the_wait_is_not_missed() -> None:
    notifier = Notifier()
    seen = notifier.count
    notifier.notify()
    notifier.notify()
    assert await notifier.wait_after(seen) == 2


async def test_a_change_is_over_for_who_waits_after_it() -> None:
    notifier = Notifier()
    notifier.notify()
    waiting = asyncio.create_task(notifier.wait_after(notifier.count))
    await settle()
    assert not waiting.done()
    notifier.notify()
    assert await waiting == 2


async def test_a_condition_is_asked_after_each_change() -> None:
    notifier, asked = Notifier(), list[int]()

    def is_second_change() -> bool:
        asked.append(notifier.count)
        return notifier.count == 2

    waiting = asyncio.create_task(notifier.wait_until(is_second_change))
    await settle()
    for _ in range(2):
        notifier.notify()
        await settle()
    await waiting
    assert asked == [0, 1, 2]


async def test_a_cancelled_waiter_affects_no_other() -> None:
    notifier = Notifier()
    leaving, staying = (asyncio.create_task(notifier.wait_after(0)) for _ in range(2))
    await settle()
    leaving.cancel()
    await settle()
    notifier.notify()
    assert await staying == 1 and leaving.cancelled()
