"""A download's progress while NATS is out."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from shoal_common.errors import NatsDown
from shoal_fetcher.downloads.state_machine import NO_PROGRESS_TIMEOUT_S, new_state
from shoal_fetcher.progress import Progress

MODEL = "org/name"


class BucketThatIsOut:
    """Refuses every write, and tells when the second one comes."""

    def __init__(self) -> None:
        self.writes = 0
        self.second_came = asyncio.Event()

    async def put(self, key: str, value: object) -> int:
        self.writes += 1
        if self.writes == 2:
            self.second_came.set()
        raise NatsDown("NATS has not answered for 60 s")


async def test_what_waits_for_NATS_does_not_stall() -> None:
    bucket = BucketThatIsOut()
    progress = Progress(cast(Any, bucket), new_state("a", MODEL, 0.0), cast(Any, None))
    progress._progress_at_s -= 2 * NO_PROGRESS_TIMEOUT_S
    assert progress.stalled_s > NO_PROGRESS_TIMEOUT_S
    publishing = asyncio.create_task(progress.publish_forever())
    async with asyncio.timeout(30):
        await bucket.second_came.wait()
    publishing.cancel()
    assert progress.stalled_s < NO_PROGRESS_TIMEOUT_S
