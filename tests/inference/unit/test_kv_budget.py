"""The KV budget that requests share: it is never exceeded, and every request finishes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_inference.stage.requests.kv_budget import KvBudget, Preempted

CONTEXT_TOKENS = 1024


async def answers(room: KvBudget, key: bytes, prompt: int, tokens: int) -> int:
    """Run a request as rank 0 does; return how often it was preempted."""
    preempted = 0
    while True:
        await room.acquire(key, prompt, again=preempted > 0)
        try:
            for so_far in range(prompt, prompt + tokens + 1, 64):
                await room.extend(key, so_far)
                assert room.free_steps >= 0
                await asyncio.sleep(0)
            return preempted
        except Preempted:
            preempted += 1
        finally:
            room.release(key)


requests = st.lists(st.tuples(st.integers(1, 512), st.integers(0, 512)), min_size=1, max_size=8)


@given(requests, st.integers(1, 3))
@settings(deadline=None)
def test_every_request_ends_and_no_more_is_taken_than_there_is(asked: Sequence[tuple[int, int]], count: int) -> None:
    async def all_of_them() -> None:
        room = KvBudget(CONTEXT_TOKENS, count)
        async with asyncio.timeout(30):
            await asyncio.gather(*(answers(room, bytes([n]), *r) for n, r in enumerate(asked)))
        assert room.free_steps == 4 * count

    asyncio.run(all_of_them())


async def test_the_youngest_is_preempted_and_first_of_those_waiting() -> None:
    room, began = KvBudget(CONTEXT_TOKENS, 1), []
    await room.acquire(b"old", 512)
    await room.acquire(b"young", 512)

    async def enter(key: bytes, again: bool) -> None:
        await room.acquire(key, 512, again)
        began.append(key)

    growing = asyncio.create_task(room.extend(b"old", 513))
    waiting = asyncio.create_task(enter(b"new", again=False))
    await asyncio.sleep(0)
    with pytest.raises(Preempted):
        await room.extend(b"young", 512)
    room.release(b"young")
    readmitted = asyncio.create_task(enter(b"young", again=True))
    await growing
    assert (room.free_steps, began) == (1, [])
    room.release(b"old")
    await readmitted
    await waiting
    assert began == [b"young", b"new"]


async def test_a_request_cancelled_while_it_waits_leaves_nothing() -> None:
    room = KvBudget(CONTEXT_TOKENS, 1)
    await room.acquire(b"a", 512)
    await room.acquire(b"b", 512)
    tasks = [asyncio.create_task(room.extend(b"a", 1024)), asyncio.create_task(room.acquire(b"c", 1))]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    room.release(b"a")
    room.release(b"b")
    await asyncio.wait_for(room.acquire(b"d", 1024), 5)
    assert room.free_steps == 0
