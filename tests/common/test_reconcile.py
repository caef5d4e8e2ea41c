"""The loop of every service that brings the actual state to the wanted one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.cancelling import ended
from shoal_common.errors import Unavailable
from shoal_common.reconcile import APART_S, BACK_OFF_S, back_off_s, reconcile_forever
from shoal_common.watch import View
from tests.harness.waiting import eventually


class Passes:
    """Counts its passes, and runs an action in each."""

    def __init__(self) -> None:
        self.begun_s: list[float] = []
        self.view = View("state")
        self.then: Callable[[int], Awaitable[float | None]] | None = None

    async def __call__(self) -> float | None:
        self.begun_s.append(asyncio.get_running_loop().time())
        return await self.then(len(self.begun_s)) if self.then else None

    def change(self, key: str = "a") -> None:
        self.view.apply(key, str(self.view.changes).encode())

    async def reached(self, count: int) -> None:
        async def there() -> bool:
            return len(self.begun_s) >= count

        await eventually(there, f"{count} passes")


async def running(passes: Passes, work: Callable[[], Awaitable[None]], level: bool = False) -> None:
    loop = asyncio.create_task(
        reconcile_forever("counting", (passes.view,), passes, (lambda: passes.view.comings) if level else None)
    )
    try:
        await passes.reached(1)
        await work()
        if loop.done():
            loop.result()
    finally:
        await ended(loop)


async def test_every_change_is_looked_at_and_one_during_a_pass_is_another_pass() -> None:
    passes = Passes()
    in_the_midst, go_on = asyncio.Event(), asyncio.Event()

    async def slow(number: int) -> None:
        if number == 2:
            in_the_midst.set()
            await go_on.wait()

    passes.then = slow

    async def work() -> None:
        passes.change()
        await in_the_midst.wait()
        passes.change()
        go_on.set()
        await passes.reached(3)

    await running(passes, work)
    assert len(passes.begun_s) == 3


async def test_I5_passes_never_run_hot_however_much_changes() -> None:
    passes = Passes()

    async def own_change(_: int) -> None:
        passes.change()  # the worst case: a pass triggers the next one

    passes.then = own_change
    await running(passes, lambda: passes.reached(8))
    gaps = [later - earlier for earlier, later in zip(passes.begun_s, passes.begun_s[1:], strict=False)]
    # The loop's clock and the timer's may differ by their resolution.
    assert min(gaps) >= APART_S * 0.95


async def test_what_is_no_part_of_the_level_causes_no_pass() -> None:
    passes = Passes()

    async def work() -> None:
        passes.change("a")
        await passes.reached(2)
        for _ in range(5):
            passes.change("a")  # the same value again
        passes.change("b")
        await passes.reached(3)

    await running(passes, work, level=True)
    assert len(passes.begun_s) == 3


async def test_it_looks_again_when_it_said_so_though_nothing_changes() -> None:
    passes = Passes()

    async def soon(_: int) -> float:
        return 0.01

    passes.then = soon
    await running(passes, lambda: passes.reached(4))


async def test_a_failure_is_tried_again_after_a_pause_that_changes_do_not_cut_short() -> None:
    passes = Passes()

    async def away(number: int) -> None:
        passes.change()
        if number <= 2:
            raise Unavailable("NATS is away")

    passes.then = away
    await running(passes, lambda: passes.reached(4))
    first, second, third, _ = passes.begun_s[:4]
    assert second - first >= BACK_OFF_S[0] * 0.95
    assert third - second >= 2 * BACK_OFF_S[0] * 0.95


async def test_an_error_that_is_nobodys_outage_ends_the_loop() -> None:
    passes = Passes()

    async def broken(_: int) -> None:
        raise ZeroDivisionError

    passes.then = broken
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(20):
            await reconcile_forever("counting", (passes.view,), passes)


@given(st.integers(1, 10_000))
def test_pauses_grow_and_are_bounded(failures: int) -> None:
    assert BACK_OFF_S[0] <= back_off_s(failures) <= back_off_s(failures + 1) <= BACK_OFF_S[1]
