"""What is said of a download: true, coalesced, and silent when there is nothing to say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from shoal_common.buckets import Bucket, download_key
from shoal_common.messages.records import DownloadState
from shoal_fetcher import progress as progress_module
from shoal_fetcher.progress import Progress
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.waiting import eventually

Fresh = Callable[[str], str]


def begun(here: Joined, node: str) -> Progress:
    """The progress of a new download."""
    return Progress(here.buckets.state, DownloadState(node=node, model="org/name", phase="queued"))


async def said(bucket: Bucket, node: str) -> DownloadState | None:
    return await bucket.get_as(download_key(node, "org/name"), DownloadState)


async def test_what_is_so_already_is_not_written_again(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress = begun(here, fresh("node"))
        await progress.say(phase="queued")  # so already, and not said yet
        await progress.say(waiting_for="origin b")
        before = await here.last_sequence("KV_state")
        for _ in range(5):
            await progress.say(waiting_for="origin b")
        assert await here.last_sequence("KV_state") == before


async def test_many_who_publish_at_once_share_a_write_and_none_returns_before_its_own_word_is_out(
    nats: NatsServer, fresh: Fresh
) -> None:
    async with joined(nats) as here:
        progress = begun(here, node := fresh("node"))
        before = await here.last_sequence("KV_state")

        async def finish(i: int) -> None:
            progress.whole(f"{i:064x}", f"{i:064x}", 10)
            await progress.publish()
            state = await said(here.buckets.state, node)
            assert state is not None and f"{i:064x}" in state.blobs

        await asyncio.gather(*(finish(i) for i in range(40)))
        state = await said(here.buckets.state, node)
        assert state is not None and len(state.blobs) == 40 and state.done_bytes == 400
        assert await here.last_sequence("KV_state") - before <= 3


async def test_I7_bytes_that_never_become_leaves_are_no_progress(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress = begun(here, fresh("node"))
        began_s = progress.still_s
        for _ in range(1000):
            progress.received("hub", 100)
            progress.durable("a" * 64, 0)
        assert progress.still_s >= began_s
        progress.excuse(3600)
        assert 0 <= progress.still_s < 1, "waiting for our own turn is excused, and no more than that"


async def test_idle_is_silent_and_a_stalled_download_has_no_speed(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "PUBLISH_S", 0.05)
    async with joined(nats) as here:
        progress = begun(here, node := fresh("node"))
        await progress.say(phase="fetching")
        publishing = asyncio.create_task(progress.publish_forever())
        progress.received("hub", 1 << 20)

        async def speed(wanted: Callable[[float], bool]) -> bool:
            state = await said(here.buckets.state, node)
            return state is not None and wanted(state.speed_bytes_per_s)

        await eventually(lambda: speed(lambda s: s > 0), "a speed is said")
        await eventually(lambda: speed(lambda s: s == 0), "and taken back")
        before = await here.last_sequence("KV_state")
        # Twenty more turns of the publisher, none of which has anything to say.
        with pytest.raises(AssertionError):
            await eventually(lambda: _beyond(here, before), "a write", 1.0)
        publishing.cancel()


async def _beyond(here: Joined, sequence: int) -> bool:
    return await here.last_sequence("KV_state") > sequence
