"""What has to be published again: filled from inside the critical section, emptied by the publisher."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec

from shoal_common.bus.network_use import require_network_allowed
from shoal_common.errors import ShoalError
from shoal_common.names import ModelId

PUBLISH_WAIT_S = 1.0
"""How long a request that can be answered without it waits for the state to be published."""


class PublishBatch(msgspec.Struct, frozen=True):
    """What to publish in one pass, with the disk's own state; `done` is set at its end."""

    models: set[ModelId]
    """Models (`org/name@commit`) whose published state may be wrong."""
    everything: bool
    done: asyncio.Future[None]


class PublishQueue:
    """Requests to publish. Those that wait while a pass runs are one pass: the latest state is published once."""

    def __init__(self) -> None:
        self._models: set[ModelId] = set()
        self._everything = False
        self._next_pass: asyncio.Future[None] | None = None
        self._wanted = asyncio.Event()

    def notify(self, *models: ModelId) -> None:
        """Have the disk's state published, and that of these models (`org/name@commit`), gone ones too."""
        self._models.update(models)
        self._wanted.set()

    def notify_all(self) -> None:
        """Have everything published again: NATS may have lost it."""
        self._everything = True
        self._wanted.set()

    async def publish(self, *models: ModelId) -> None:
        """Like `notify`; return once it is published. Raises ShoalError if a pass fails, which is repeated."""
        self.notify(*models)
        await self._wait_published()

    async def publish_all(self) -> None:
        """Like `notify_all`; return once it is published. Raises ShoalError if a pass fails, which is repeated."""
        self.notify_all()
        await self._wait_published()

    async def publish_soon(self, *models: ModelId) -> None:
        """Like `publish`, but wait for at most PUBLISH_WAIT_S and for no NATS that is down."""
        with suppress(TimeoutError, ShoalError):
            async with asyncio.timeout(PUBLISH_WAIT_S):
                await self.publish(*models)

    async def _wait_published(self) -> None:
        require_network_allowed()
        if self._next_pass is None:
            self._next_pass = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next_pass)

    # The publisher's side

    async def take(self) -> PublishBatch:
        """Return what to publish, once there is something."""
        await self._wanted.wait()
        self._wanted.clear()
        done = self._next_pass or asyncio.get_running_loop().create_future()
        batch = PublishBatch(self._models, self._everything, done)
        self._models, self._everything, self._next_pass = set(), False, None
        return batch

    def end(self, batch: PublishBatch) -> None:
        """End a pass: all of it is published."""
        batch.done.set_result(None)

    def fail(self, batch: PublishBatch, error: ShoalError) -> None:
        """End a pass that failed: who waits for it gets the error, and the next pass publishes what it left."""
        self._models |= batch.models
        self._everything |= batch.everything
        self._wanted.set()
        batch.done.set_exception(error)
        batch.done.exception()  # nobody may be waiting
