"""Read the stream EVT in order, from a cursor on, through restarts of NATS.

Each reader has its own ephemeral consumer and requests one batch at a time: unread events stay in the stream, which
is bounded, and are never buffered here. NATS removes a consumer whose reader vanished (I8).
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

from shoal_common.bus import cluster_clock
from shoal_common.bus.connection import Nats
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.logs import StructuredLogger
from shoal_gateway.events.sse import Event, EventQuery, Gap, KeepAlive, LogReset, StreamItem, parse_event

log = StructuredLogger("events")

STREAM = "EVT"
CONSUMER_INACTIVE_TIMEOUT_S = 60.0
"""NATS removes a consumer that got no request for this long."""
BATCH_SIZE = 256
"""Most events requested from NATS at a time, and so the most buffered here for one reader."""
_RETRY_INTERVAL_S = 0.5
_GRACE_S = 5.0
"""How long after its expiry NATS may report the end of an unanswered request."""
_EXPIRED_STATUS = "408"
_NEXT = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}"


class ConsumerLost(Exception):
    """This consumer delivers nothing more: a new one must take over."""


class EventLogReader:
    """Reads the log until everything asked for is delivered, or `stopping` is set."""

    def __init__(self, nats: Nats, query: EventQuery, keep_alive_s: float, stopping: asyncio.Event) -> None:
        self._nats, self._query, self._quiet_s, self._stopping = nats, query, keep_alive_s, stopping
        self.cursor = query.after
        """Everything asked for up to this sequence has been delivered."""
        self._created_at: datetime | None = None
        self._last = 0
        self._complete = False

    async def read(self) -> AsyncGenerator[StreamItem, None]:
        """Yield everything asked for, in order, each once; `KeepAlive` about every `quiet_s` seconds at least."""
        while not self._stopping.is_set():
            connection = self._nats.reconnects.count
            try:
                async with aclosing(self._read_on(connection)) as items:
                    async for item in items:
                        yield item
                if self._complete:
                    return
            except (NatsError, ConsumerLost) as e:
                log.debug("event consumer lost; making a new one", reason=str(e) or type(e).__name__)
                yield KeepAlive(self.cursor)
                await asyncio.sleep(_RETRY_INTERVAL_S)

    async def _read_on(self, connection: int) -> AsyncGenerator[StreamItem, None]:
        """Create a consumer after the cursor and yield what it delivers. Ends when all is delivered, or at a stop."""
        for item in await self._check_cursor():
            yield item
        consumer, skip_count = await self._start()
        inbox = self._nats.client.new_inbox()
        subscription = await self._nats.client.subscribe(inbox)
        interrupted = asyncio.ensure_future(self._interrupted(connection))
        try:
            if self.cursor is None and consumer.delivered is not None:
                # The starting cursor is known before the first event, so nothing is lost if that takes long to come.
                self.cursor = consumer.delivered.stream_seq
            yield KeepAlive(self.cursor)
            if not self._query.follow and not consumer.num_pending:
                self._complete = True
                return
            while True:
                last = self._last
                await self._request_batch(consumer.name, inbox)
                for _ in range(BATCH_SIZE):
                    message = await self._next(subscription, interrupted)
                    if message is None:
                        return
                    if _is_expired(message):
                        self.cursor = max(self.cursor or 0, last)
                        yield KeepAlive(self.cursor)
                        break
                    event = _event_of(message)
                    self.cursor = event.sequence
                    if skip_count:
                        skip_count -= 1
                    else:
                        yield event
                    if not self._query.follow and not message.metadata.num_pending:
                        self._complete = True
                        return
                for item in await self._check_cursor():
                    yield item
        finally:
            await cancel_and_wait(interrupted)
            await self._delete_consumer(consumer.name, subscription)

    async def _check_cursor(self) -> list[StreamItem]:
        """Compare the cursor with the log; move it to the oldest event where the log no longer holds it."""
        info = await self._nats.js.stream_info(STREAM)
        created_at, self._created_at = self._created_at, info.created
        self._last = info.state.last_seq
        if self.cursor is None:
            return []
        after, oldest = self.cursor, max(info.state.first_seq - 1, 0)
        if after > info.state.last_seq or (created_at is not None and created_at != info.created):
            self.cursor = oldest
            return [LogReset(after, oldest)]
        if after < oldest:
            self.cursor = oldest
            return [Gap(after, oldest)]
        return []

    async def _start(self) -> tuple[api.ConsumerInfo, int]:
        """Create a consumer at the reader's position; also return how many of its first events to skip."""
        if self.cursor is not None:
            return await self._consumer_after(self.cursor), 0
        if self._query.last is not None:
            return await self._consumer_of_last(self._query.last)
        if self._query.since_s is not None:
            begin = datetime.fromtimestamp(cluster_clock.now_s() - self._query.since_s, UTC)
            return await self._consumer(
                api.ConsumerConfig(deliver_policy=api.DeliverPolicy.BY_START_TIME, opt_start_time=begin)
            ), 0
        return await self._consumer(api.ConsumerConfig(deliver_policy=api.DeliverPolicy.NEW)), 0

    async def _consumer_of_last(self, count: int) -> tuple[api.ConsumerInfo, int]:
        # A new consumer reports its pending events: go back, twice as far each time, until there are enough.
        offset = max(count, 1)
        while True:
            after = max(self._last - offset, 0)
            consumer = await self._consumer_after(after)
            pending = consumer.num_pending or 0
            # NATS starts at its oldest event where we ask for an older one.
            start = consumer.delivered.stream_seq if consumer.delivered else after
            if pending >= count or start > after or after == 0:
                return consumer, max(pending - count, 0)
            await self._delete_consumer(consumer.name, None)
            offset *= 2

    async def _consumer_after(self, cursor: int) -> api.ConsumerInfo:
        return await self._consumer(
            api.ConsumerConfig(deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE, opt_start_seq=cursor + 1)
        )

    async def _consumer(self, config: api.ConsumerConfig) -> api.ConsumerInfo:
        config.filter_subject = self._query.subject
        config.ack_policy = api.AckPolicy.NONE
        config.inactive_threshold = CONSUMER_INACTIVE_TIMEOUT_S
        config.mem_storage, config.num_replicas = True, 1
        return await self._nats.js.add_consumer(STREAM, config)

    async def _request_batch(self, consumer: str, inbox: str) -> None:
        # Not nats-py's fetch: it holds events back until the batch is full or has expired.
        request = {"batch": BATCH_SIZE, "expires": int(self._quiet_s * 1e9)}
        await self._nats.client.publish(f"{_NEXT}.{consumer}", msgspec.json.encode(request), reply=inbox)

    async def _next(self, subscription: Subscription, interrupted: asyncio.Future[None]) -> Msg | None:
        """Return the next message, or None once interrupted. Raises ConsumerLost when no message or status comes."""
        receiving = asyncio.ensure_future(subscription.next_msg(timeout=self._quiet_s + _GRACE_S))
        try:
            waits: list[asyncio.Future[Any]] = [receiving, interrupted]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else None
        except NatsTimeoutError:
            raise ConsumerLost("NATS did not report the expiry of a request") from None
        finally:
            await cancel_and_wait(receiving)

    async def _interrupted(self, connection: int) -> None:
        """Return once this gateway stops, or NATS was reconnected and may have lost the consumer."""
        waits: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._nats.reconnects.wait_after(connection)),
            asyncio.ensure_future(self._stopping.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(*waits)

    async def _delete_consumer(self, consumer: str, subscription: Subscription | None) -> None:
        # Where NATS is down now, it removes the consumer later by itself.
        with suppress(NatsError):
            if subscription is not None:
                await subscription.unsubscribe()
            if self._nats.connected:
                await self._nats.js.delete_consumer(STREAM, consumer)


def _is_expired(message: Msg) -> bool:
    """Return whether a batch request has expired unfilled. Raises ConsumerLost at any other status of NATS."""
    status = JetStreamContext.is_status_msg(message)
    if status is None or status == _EXPIRED_STATUS:
        return status is not None
    raise ConsumerLost(f"NATS status {status} {(message.headers or {}).get('Description', '')}".rstrip())


def _event_of(message: Msg) -> Event:
    metadata = message.metadata
    assert metadata.sequence is not None and metadata.timestamp is not None
    return parse_event(message.subject, message.data, metadata.sequence.stream, metadata.timestamp.timestamp())
