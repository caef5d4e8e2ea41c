"""The queue of what is to be published: one pass for many requests, and no pass lost."""

from __future__ import annotations

import asyncio

import pytest

from shoal_common.errors import Unavailable
from shoal_common.names import model_id
from shoal_storage import publish_queue
from shoal_storage.publish_queue import PublishQueue

A, B, C = (model_id(repo, "1") for repo in ("org/a", "org/b", "org/c"))


async def test_requests_during_a_pass_are_published_in_one_next_pass() -> None:
    queue = PublishQueue()
    waiting = [asyncio.create_task(queue.publish(A))]
    first = await queue.take()
    waiting += [asyncio.create_task(queue.publish(model)) for model in (A, B)]
    queue.notify(C)
    await asyncio.sleep(0)
    queue.end(first)
    await waiting[0]
    assert first.models == {A} and not waiting[1].done(), "a pass that had begun may have read an older state"
    second = await queue.take()
    assert second.models == {A, B, C} and not second.everything
    queue.end(second)
    await asyncio.gather(*waiting)


async def test_a_failed_pass_fails_who_waits_and_is_repeated() -> None:
    queue = PublishQueue()
    waiting = asyncio.create_task(queue.publish(A))
    batch = await queue.take()
    queue.notify_all()
    queue.fail(batch, Unavailable("NATS has not answered"))
    with pytest.raises(Unavailable):
        await waiting
    again = await queue.take()
    assert again.models == {A} and again.everything
    queue.fail(again, Unavailable("nobody waits for this one"))
    assert (await queue.take()).everything


async def test_a_request_that_can_do_without_waits_only_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_queue, "PUBLISH_WAIT_S", 0.0)
    queue = PublishQueue()
    await queue.publish_soon(A)  # nothing takes it
    batch = await queue.take()
    assert batch.models == {A}
    queue.end(batch)
