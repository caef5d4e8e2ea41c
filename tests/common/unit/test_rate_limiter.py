"""A shared rate limit: how long callers wait, by the test's own clock where time is compared."""

import asyncio

import pytest

from shoal_common.host.rate_limiter import RateLimiter


def test_without_a_limit_nobody_waits() -> None:
    with pytest.raises(StopIteration):  # it returns before it ever waits
        RateLimiter(None).acquire(1 << 40).send(None)


async def test_takers_wait_in_turn_and_any_size_gets_through() -> None:
    now_s, order = 0.0, []
    limiter = RateLimiter(100, clock_s=lambda: now_s)

    async def take(name: str, count: int) -> None:
        await limiter.acquire(count)
        order.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(take("large", 100_000))
        tasks.create_task(take("small", 1))
        await asyncio.sleep(0)
        assert order == []
        now_s = 2000.0
        limiter.set_rate(None)
    assert order == ["large", "small"]


async def test_a_limit_that_is_lifted_frees_who_waits() -> None:
    limiter = RateLimiter(1)
    waiting = asyncio.ensure_future(limiter.acquire(1_000_000))
    await asyncio.sleep(0)
    limiter.set_rate(None)
    async with asyncio.timeout(60):
        await waiting


async def test_a_limit_that_is_raised_shortens_what_is_left_of_a_wait() -> None:
    limiter = RateLimiter(1)
    waiting = asyncio.ensure_future(limiter.acquire(1_000_000))
    await asyncio.sleep(0)
    limiter.set_rate(1_000_000_000)
    async with asyncio.timeout(60):
        await waiting
    assert limiter.bytes_per_s == 1_000_000_000


@pytest.mark.parametrize("count", [0, 1, 1 << 20])
async def test_a_first_taker_waits_as_long_as_its_bytes_take(count: int) -> None:
    now_s = 10.0
    limiter = RateLimiter(1 << 20, clock_s=lambda: now_s)
    waiting = asyncio.ensure_future(limiter.acquire(count))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert waiting.done() == (count == 0)
    waiting.cancel()
