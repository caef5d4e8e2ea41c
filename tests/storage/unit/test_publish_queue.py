"""The queue of what is to be published: one pass for many requests, and no pass lost."""

from __future__ import annotations

import asyncio

import pytest

from shoal_common.errors import Unavailable
from shoal_storage import publish_queue
from shoal_storage.publish_queue import PublishQueue


async def test_requests_during_a_pass_are_published_in_one_next_pass() -> None:
    queue = PublishQueue()
    waiting = [asyncio.create_task(queue.publish("org/a@1"))]
    first = await queue.take()
    waiting += [asyncio.create_task(queue.publish(model)) for model in ("org/a@1", "org/b@1")]
    queue.notify("org/c@1")
    await asyncio.sleep(0)
    queue.end(first)
    await waiting[0]
    assert first.models == {"org/a@1"} and not waiting[1].done(), "a pass that had begun may have read an older state"
    second = await queue.take()
    assert second.models == {"org/a@1", "org/b@1", "org/c@1"} and not second.everything
    queue.end(second)
    await asyncio.gather(*waiting)


async def test_a_failed_pass_fails_who_waits_and_is_repeated() -> None:
    queue = PublishQueue()
    waiting = asyncio.create_task(queue.publish("org/a@1"))
    batch = await queue.take()
    queue.notify_all()
    queue.fail(batch, Unavailable("NATS has not answered"))
    with pytest.raises(Unavailable):
        await waiting
    again = await queue.take()
    assert again.models == {"org/a@1"} and again.everything
    queue.fail(again, Unavailable("nobody waits for this one"))
    assert (await queue.take()).everything


async def test_a_request_that_can_do_without_waits_only_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_queue, "PUBLISH_WAIT_S", 0.0)
    queue = PublishQueue()
    await queue.publish_soon("org/a@1")  # nothing takes it
    batch = await queue.take()
    assert batch.models == {"org/a@1"}
    queue.end(batch)
