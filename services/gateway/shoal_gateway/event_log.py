"""Reads the stream EVT in order, from a place on, through restarts of NATS.

Each reader has an ephemeral consumer of its own and asks it for a batch at a time: what nobody reads stays in the
stream, which is bounded, and never here. A consumer whose reader vanished goes by itself (I8).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext, api

from shoal_common import clock
from shoal_common.cancelling import ended
from shoal_common.connection import Nats
from shoal_common.logs import Log
from shoal_gateway.events import Anew, Asked, Event, Lost, Quiet, Told, read_event

log = Log("events")

STREAM = "EVT"
INACTIVE_S = 60.0
"""A consumer that nobody asks for so long is removed by NATS."""
BATCH_COUNT = 256
"""Most events that are asked of NATS at a time, and so the most that wait here for one reader."""
_RETRY_S = 0.5
_LATE_S = 5.0
"""How much later than its time the end of an unanswered request may be told."""
_TIME_UP = "408"
_NEXT = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}"


class Broken(Exception):
    """This consumer tells nothing more: a new one has to go on."""


class Reader:
    """One reader of the log: `read` until it has told all that was asked for, or `stopping` is set."""

    def __init__(self, nats: Nats, asked: Asked, quiet_s: float, stopping: asyncio.Event) -> None:
        self._nats, self._asked, self._quiet_s, self._stopping = nats, asked, quiet_s, stopping
        self.cursor = asked.after
        """Up to here everything that was asked for has been told."""
        self._made: datetime | None = None
        self._last = 0
        self._whole = False

    async def read(self) -> AsyncGenerator[Told, None]:
        """All that was asked for, in order, each once; `Quiet` at least every `quiet_s` seconds or so."""
        while not self._stopping.is_set():
            connection = self._nats.reconnects.count
            try:
                async with aclosing(self._read_on(connection)) as told:
                    async for item in told:
                        yield item
                if self._whole:
                    return
            except (NatsError, Broken) as e:
                log.debug("reading events anew", why=str(e) or type(e).__name__)
                yield Quiet(self.cursor)
                await asyncio.sleep(_RETRY_S)

    async def _read_on(self, connection: int) -> AsyncGenerator[Told, None]:
        """Make a consumer after the cursor and tell what it has. Returns when all is told, or at a stop."""
        for news in await self._look():
            yield news
        consumer, skip_count = await self._begin()
        inbox = self._nats.client.new_inbox()
        subscription = await self._nats.client.subscribe(inbox)
        interrupted = asyncio.ensure_future(self._interrupted(connection))
        try:
            if self.cursor is None and consumer.delivered is not None:
                # Where it begins: known before the first event, so that nothing is lost if that is long to come.
                self.cursor = consumer.delivered.stream_seq
            yield Quiet(self.cursor)
            if not self._asked.follow and not consumer.num_pending:
                self._whole = True
                return
            while True:
                last = self._last
                await self._ask(consumer.name, inbox)
                for _ in range(BATCH_COUNT):
                    message = await self._next(subscription, interrupted)
                    if message is None:
                        return
                    if _time_is_up(message):
                        self.cursor = max(self.cursor or 0, last)
                        yield Quiet(self.cursor)
                        break
                    event = _event_of(message)
                    self.cursor = event.sequence
                    if skip_count:
                        skip_count -= 1
                    else:
                        yield event
                    if not self._asked.follow and not message.metadata.num_pending:
                        self._whole = True
                        return
                for news in await self._look():
                    yield news
        finally:
            await ended(interrupted)
            await self._forget(consumer.name, subscription)

    async def _look(self) -> list[Told]:
        """Compare the cursor with what the log holds now; move it to the oldest where they do not fit."""
        info = await self._nats.js.stream_info(STREAM)
        made, self._made = self._made, info.created
        self._last = info.state.last_seq
        if self.cursor is None:
            return []
        after, oldest = self.cursor, max(info.state.first_seq - 1, 0)
        if after > info.state.last_seq or (made is not None and made != info.created):
            self.cursor = oldest
            return [Anew(after, oldest)]
        if after < oldest:
            self.cursor = oldest
            return [Lost(after, oldest)]
        return []

    async def _begin(self) -> tuple[api.ConsumerInfo, int]:
        """A consumer that begins where we are, and how many of its first events nobody asked for."""
        if self.cursor is not None:
            return await self._consumer_after(self.cursor), 0
        if self._asked.last is not None:
            return await self._consumer_of_last(self._asked.last)
        if self._asked.since_s is not None:
            begin = datetime.fromtimestamp(clock.now_s() - self._asked.since_s, UTC)
            return await self._consumer(
                api.ConsumerConfig(deliver_policy=api.DeliverPolicy.BY_START_TIME, opt_start_time=begin)
            ), 0
        return await self._consumer(api.ConsumerConfig(deliver_policy=api.DeliverPolicy.NEW)), 0

    async def _consumer_of_last(self, count: int) -> tuple[api.ConsumerInfo, int]:
        # A new consumer says how many events are before it: go back, twice as far each time, until it is enough.
        back = max(count, 1)
        while True:
            after = max(self._last - back, 0)
            consumer = await self._consumer_after(after)
            pending = consumer.num_pending or 0
            # NATS begins with the oldest it has where we ask for an older one.
            began = consumer.delivered.stream_seq if consumer.delivered else after
            if pending >= count or began > after or after == 0:
                return consumer, max(pending - count, 0)
            await self._forget(consumer.name, None)
            back *= 2

    async def _consumer_after(self, cursor: int) -> api.ConsumerInfo:
        return await self._consumer(
            api.ConsumerConfig(deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=cursor + 1)
        )

    async def _consumer(self, config: api.ConsumerConfig) -> api.ConsumerInfo:
        config.filter_subject = self._asked.subject
        config.ack_policy = api.AckPolicy.NONE
        config.inactive_threshold = INACTIVE_S
        config.mem_storage, config.num_replicas = True, 1
        return await self._nats.js.add_consumer(STREAM, config)

    async def _ask(self, consumer: str, inbox: str) -> None:
        # Not nats-py's fetch: it holds back what has come until the batch is full or its time is up.
        request = {"batch": BATCH_COUNT, "expires": int(self._quiet_s * 1e9)}
        await self._nats.client.publish(f"{_NEXT}.{consumer}", msgspec.json.encode(request), reply=inbox)

    async def _next(self, subscription: Subscription, interrupted: asyncio.Future[None]) -> Msg | None:
        """The next message, or None once we are interrupted. Raises when the consumer has nothing more to say."""
        coming = asyncio.ensure_future(subscription.next_msg(timeout=self._quiet_s + _LATE_S))
        try:
            waits: list[asyncio.Future[Any]] = [coming, interrupted]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return coming.result() if coming.done() else None
        except NatsTimeoutError:
            raise Broken("NATS has not said that a request's time is up") from None
        finally:
            await ended(coming)

    async def _interrupted(self, connection: int) -> None:
        """Return once this gateway stops, or NATS has been reached anew and may have forgotten the consumer."""
        waits: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._nats.reconnects.wait_after(connection)),
            asyncio.ensure_future(self._stopping.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await ended(*waits)

    async def _forget(self, consumer: str, subscription: Subscription | None) -> None:
        # What cannot be removed now, because NATS is away, it removes by itself.
        with suppress(NatsError):
            if subscription is not None:
                await subscription.unsubscribe()
            if self._nats.connected:
                await self._nats.js.delete_consumer(STREAM, consumer)


def _time_is_up(message: Msg) -> bool:
    """Whether this says that a request has ended without being filled. Raises Broken at any other word of NATS."""
    status = JetStreamContext.is_status_msg(message)
    if status is None or status == _TIME_UP:
        return status is not None
    raise Broken(f"NATS says {status} {(message.headers or {}).get('Description', '')}".rstrip())


def _event_of(message: Msg) -> Event:
    about = message.metadata
    assert about.sequence is not None and about.timestamp is not None
    return read_event(message.subject, message.data, about.sequence.stream, about.timestamp.timestamp())
