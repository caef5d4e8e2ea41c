"""The published state of a download: true, coalesced, and silent when nothing changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from msgspec import structs
from nats.aio.msg import Msg

from shoal_common.bus.keys import download_key
from shoal_common.bus.kv_bucket import Bucket
from shoal_common.messages import decode
from shoal_common.messages.downloads import DownloadPhase, DownloadState
from shoal_fetcher import progress as progress_module
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.source_changes import SourceChange
from tests.harness.fresh import Fresh
from tests.harness.nats import Joined, NatsServer, joined
from tests.harness.waiting import eventually


class Deaf:
    """A listener that is interested in nothing."""

    def on_waiting(self, reason: str) -> None:
        """Ignore it."""

    def on_no_progress(self, path: str, stalled_s: float, reason: str) -> None:
        """Ignore it."""

    async def on_source_change(self, change: SourceChange) -> None:
        """Ignore it."""


def begun(here: Joined, node: str) -> Progress:
    """The progress of a new download."""
    return Progress(here.buckets.state, DownloadState(node=node, model="org/name", phase="queued"), Deaf())


def decide(progress: Progress, **changes: object) -> None:
    """Change what is published, as the state machine does."""
    progress.set_state(structs.replace(progress.state, **changes))


async def published_state(bucket: Bucket, node: str) -> DownloadState | None:
    return await bucket.get_as(download_key(node, "org/name"), DownloadState)


async def test_what_is_so_already_is_not_written_again(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress = begun(here, fresh("node"))
        await progress.publish_changes()  # so already, and not published yet
        decide(progress, waiting_for="origin b")
        await progress.publish_changes()
        before = await here.last_sequence("KV_state")
        for _ in range(5):
            decide(progress, waiting_for="origin b")
            await progress.publish_changes()
        assert await here.last_sequence("KV_state") == before


async def test_concurrent_publishers_share_writes_and_wait_for_theirs(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress = begun(here, node := fresh("node"))
        before = await here.last_sequence("KV_state")

        async def finish(i: int) -> None:
            progress.set_blob_complete(f"{i:064x}", f"{i:064x}", 10)
            await progress.publish()
            state = await published_state(here.buckets.state, node)
            assert state is not None and f"{i:064x}" in state.blobs

        await asyncio.gather(*(finish(i) for i in range(40)))
        state = await published_state(here.buckets.state, node)
        assert state is not None and len(state.blobs) == 40 and state.done_bytes == 400
        assert await here.last_sequence("KV_state") - before <= 3


async def test_I7_bytes_that_never_become_leaves_are_no_progress(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress = begun(here, fresh("node"))
        began_s = progress.stalled_s
        for _ in range(1000):
            progress.record_received("hub", 100)
            progress.set_durable_bytes("a" * 64, 0)
        assert progress.stalled_s >= began_s
        progress.pause_stall_timer(3600)
        assert 0 <= progress.stalled_s < 1, "waiting for our own turn is excused, and no more than that"


async def test_idle_progress_is_silent_and_a_stalled_one_has_no_rate(
    nats: NatsServer, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "PUBLISH_INTERVAL_S", 0.05)
    async with joined(nats) as here:
        progress = begun(here, node := fresh("node"))
        decide(progress, phase="fetching")
        publishing = asyncio.create_task(progress.publish_forever())
        progress.record_received("hub", 1 << 20)

        async def speed(wanted: Callable[[float], bool]) -> bool:
            state = await published_state(here.buckets.state, node)
            return state is not None and wanted(state.speed_bytes_per_s)

        await eventually(lambda: speed(lambda s: s > 0), "a speed is said")
        await eventually(lambda: speed(lambda s: s == 0), "and back to zero")
        before = await here.last_sequence("KV_state")
        # Twenty more rounds of the publisher, none of which has anything to publish.
        with pytest.raises(AssertionError):
            await eventually(lambda: _beyond(here, before), "a write", 1.0)
        publishing.cancel()


async def _beyond(here: Joined, sequence: int) -> bool:
    return await here.last_sequence("KV_state") > sequence


async def test_many_small_files_cost_one_write_a_second_and_a_phase(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress = begun(here, node := fresh("node"))
        writes: list[DownloadState] = []

        async def wrote(message: Msg) -> None:
            writes.append(decode(message.data, DownloadState))

        key = download_key(node, "org/name")
        await here.client.subscribe(f"$KV.state.{key}", cb=wrote)
        begun_s, published, files_count = time.monotonic(), list[int](), 0
        publishing = asyncio.create_task(progress.publish_forever())
        phases: list[DownloadPhase] = ["queued", "reserving", "fetching"]
        for phase in phases:
            decide(progress, phase=phase, total_bytes=1 << 40)
            await progress.publish_changes()

        async def publish_file(number: int) -> None:
            published.append(number)

        while len(writes) < 5 or not published:
            files_count += 1
            progress.record_received(("hub", "b")[files_count % 2], 1 << 20)
            progress.set_durable_bytes("a" * 64, files_count)
            progress.set_blob_complete(f"{files_count:064x}", f"{files_count:064x}", 1 << 20)
            decide(progress, waiting_for=("origin b", "")[files_count % 2])
            then = AsyncExitStack()
            then.push_async_callback(publish_file, files_count)
            progress.after_publish(then)
            await asyncio.sleep(0.002)
        decide(progress, phase="verifying")
        await progress.publish_changes()
        publishing.cancel()
        await here.client.flush()
        elapsed_s = time.monotonic() - begun_s
        assert len(writes) <= int(elapsed_s) + len(phases) + 1, (len(writes), elapsed_s)
        assert sorted(published) == list(range(1, files_count + 1)), "each once"
        assert len(writes[-1].blobs) == files_count and writes[-1].phase == "verifying"
        fetching = [w for w in writes if w.source_speeds]
        assert fetching and set(fetching[-1].source_speeds) == {"hub", "b"}
        assert fetching[-1].speed_bytes_per_s == sum(fetching[-1].source_speeds.values())
        assert fetching[-1].eta_s is not None and fetching[-1].eta_s > 0
        assert writes[-1].verified_bytes == files_count << 20 and writes[-1].eta_s is None


async def test_after_publish_callbacks_run_when_the_progress_closes(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress, closed = begun(here, fresh("node")), asyncio.Event()
        then = AsyncExitStack()
        then.callback(closed.set)
        progress.after_publish(then)
        assert not closed.is_set()
        await progress.close()
        assert closed.is_set()


async def test_stalled_sources_are_counted_by_name_up_to_a_few_names(nats: NatsServer, fresh: Fresh) -> None:
    async with joined(nats) as here:
        progress = begun(here, node := fresh("node"))
        for number in range(100):
            progress.record_switch("hub")
            progress.record_switch(f"node-{number}")
        await progress.publish()
        state = await published_state(here.buckets.state, node)
        assert state is not None and state.source_switches["hub"] == 100 and len(state.source_switches) == 16
