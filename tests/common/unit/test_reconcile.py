"""The loop of every service that brings the actual state to the wanted one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.reconcile import MIN_PASS_INTERVAL_S, RETRY_BACKOFF, reconcile_forever
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.errors import Unavailable
from tests.harness.waiting import eventually


class Passes:
    """Counts its passes, and runs an action in each."""

    def __init__(self) -> None:
        self.begun_s: list[float] = []
        self.view = KvMirror("state")
        self.then: Callable[[int], Awaitable[float | None]] | None = None

    async def __call__(self) -> float | None:
        self.begun_s.append(asyncio.get_running_loop().time())
        return await self.then(len(self.begun_s)) if self.then else None

    def change(self, key: str = "a") -> None:
        self.view.apply(key, str(self.view.changes).encode())

    async def wait_count(self, count: int) -> None:
        async def enough() -> bool:
            return len(self.begun_s) >= count

        await eventually(enough, f"{count} passes")


async def running(passes: Passes, work: Callable[[], Awaitable[None]], level: bool = False) -> None:
    loop = asyncio.create_task(
        reconcile_forever("counting", (passes.view,), passes, (lambda: passes.view.key_changes) if level else None)
    )
    try:
        await passes.wait_count(1)
        await work()
        if loop.done():
            loop.result()
    finally:
        await cancel_and_wait(loop)


async def test_every_change_causes_a_pass_also_one_during_a_pass() -> None:
    passes = Passes()
    in_the_midst, resume = asyncio.Event(), asyncio.Event()

    async def slow(number: int) -> None:
        if number == 2:
            in_the_midst.set()
            await resume.wait()

    passes.then = slow

    async def work() -> None:
        passes.change()
        await in_the_midst.wait()
        passes.change()
        resume.set()
        await passes.wait_count(3)

    await running(passes, work)
    assert len(passes.begun_s) == 3


async def test_I5_passes_never_run_hot_however_much_changes() -> None:
    passes = Passes()

    async def own_change(_: int) -> None:
        passes.change()  # the worst case: a pass triggers the next one

    passes.then = own_change
    await running(passes, lambda: passes.wait_count(8))
    gaps = [later - earlier for earlier, later in zip(passes.begun_s, passes.begun_s[1:], strict=False)]
    # The loop's clock and the timer's may differ by their resolution.
    assert min(gaps) >= MIN_PASS_INTERVAL_S * 0.95


async def test_a_change_that_leaves_the_level_as_it_is_causes_no_pass() -> None:
    passes = Passes()

    async def work() -> None:
        passes.change("a")
        await passes.wait_count(2)
        for _ in range(5):
            passes.change("a")  # the same value again
        passes.change("b")
        await passes.wait_count(3)

    await running(passes, work, level=True)
    assert len(passes.begun_s) == 3


async def test_a_pass_that_asks_to_run_again_does_without_a_change() -> None:
    passes = Passes()

    async def soon(_: int) -> float:
        return 0.01

    passes.then = soon
    await running(passes, lambda: passes.wait_count(4))


async def test_a_failure_is_retried_after_a_pause_changes_do_not_cut() -> None:
    passes = Passes()

    async def fail_twice(number: int) -> None:
        passes.change()
        if number <= 2:
            raise Unavailable("NATS is away")

    passes.then = fail_twice
    await running(passes, lambda: passes.wait_count(4))
    first, second, third, _ = passes.begun_s[:4]
    assert second - first >= RETRY_BACKOFF.first_s * 0.95
    assert third - second >= 2 * RETRY_BACKOFF.first_s * 0.95


async def test_an_error_that_is_nobodys_outage_ends_the_loop() -> None:
    passes = Passes()

    async def raise_bug(_: int) -> None:
        raise ZeroDivisionError

    passes.then = raise_bug
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(20):
            await reconcile_forever("counting", (passes.view,), passes)
