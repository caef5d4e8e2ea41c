"""The command worker: pulls a service's commands off the work queue, does each once, and always says how it ended.

A command reaches a service twice: stored, through the stream's consumer, which is what makes it happen even if
everybody dies meanwhile; and as the plain message, which carries the reply subject that the stream does not keep.
The `Desk` joins the two, so that `nats req` gets the outcome as its first reply (the stream sends no acks).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import api
from nats.js import errors as jse

from shoal_common import clock, subjects, telemetry
from shoal_common.buckets import COMMAND_MAX_AGE_S, Buckets, done_key, patiently
from shoal_common.cancelling import ended
from shoal_common.connection import Nats
from shoal_common.desk import Desk, command_id
from shoal_common.errors import BadInput, BadMessage, Expired, Failed, ShoalError, Unavailable, as_body
from shoal_common.events import Events
from shoal_common.logs import Log
from shoal_common.messages import decode
from shoal_common.messages.commands import Command, Outcome

log = Log("commands")

ACK_WAIT_S = 15.0
MAX_AT_ONCE = 512
"""More than a fetcher runs downloads, each a command that waits: a `cancel` must not queue behind them."""
MAX_DELIVERIES = 10
_PULL_S = 300.0
_RETRY_S = 1.0


class Verb(msgspec.Struct, frozen=True):
    """One command of a service: its message, who carries it out, and how long it may take by default."""

    kind: type[Any]
    handle: Callable[[Any, str], Awaitable[object]]
    """Given the command and its id; returns the result, raises ShoalError."""
    deadline_s: float


class CommandWorker:
    """Carries out the commands of one service, addressed to its node, or to `any` while it leads."""

    def __init__(
        self,
        nats: Nats,
        buckets: Buckets,
        events: Events,
        service: str,
        node: str,
        verbs: Mapping[str, Verb],
    ) -> None:
        self._nats, self._buckets, self._events = nats, buckets, events
        self._service, self._node, self._verbs = service, node, verbs
        self._desk = Desk(nats, buckets)
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._jobs: set[asyncio.Task[None]] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, address: str, stopping: asyncio.Event) -> None:
        """Work until `stopping`. `address` is the node, or `any`. Unfinished commands go back to the queue."""
        subject = subjects.commands_of(self._service, address)
        async with asyncio.TaskGroup() as tasks:
            desk = tasks.create_task(self._desk.listen(subject))
            pulling = tasks.create_task(self._pull_forever(subjects.durable(self._service, address), subject, tasks))
            await stopping.wait()
            await ended(desk, pulling)
            await ended(*self._jobs)

    async def _pull_forever(self, durable: str, subject: str, tasks: asyncio.TaskGroup) -> None:
        while True:
            try:
                await self._ensure_consumer(subject, durable)
                await self._pull(durable, tasks)
            except (NatsError, Unavailable) as e:
                log.debug("pulling commands anew", why=str(e) or type(e).__name__)
                await asyncio.sleep(_RETRY_S)

    async def _ensure_consumer(self, subject: str, durable: str) -> None:
        wanted = api.ConsumerConfig(
            durable_name=durable,
            filter_subject=subject,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_ack_pending=MAX_AT_ONCE,
            # A retired node's consumer goes by itself (I8): the queue keeps the commands, not the consumer.
            inactive_threshold=COMMAND_MAX_AGE_S,
        )
        # Creating is also updating: an old consumer's settings are brought in line.
        await patiently(lambda: self._nats.js.add_consumer("CMD", wanted))

    async def _pull(self, durable: str, tasks: asyncio.TaskGroup) -> None:
        connection = self._nats.reconnects.count
        queue = await self._nats.js.pull_subscribe_bind(durable=durable, stream="CMD")
        reconnected = asyncio.ensure_future(self._nats.reconnects.wait_after(connection))
        try:
            while True:
                await self._slots.acquire()
                fetching = asyncio.ensure_future(queue.fetch(1, timeout=_PULL_S))
                taken = False
                try:
                    await asyncio.wait({fetching, reconnected}, return_when=asyncio.FIRST_COMPLETED)
                    if not fetching.done():
                        return  # a restarted server has forgotten our request
                    with suppress(NatsTimeoutError, jse.FetchTimeoutError):
                        for message in fetching.result():
                            job = tasks.create_task(self._work(message))
                            self._jobs.add(job)
                            job.add_done_callback(self._jobs.discard)
                            taken = True
                finally:
                    fetching.cancel()
                    if not taken:
                        self._slots.release()
        finally:
            reconnected.cancel()
            # A cancelled fetch leaves a request behind that would swallow the next command.
            with suppress(Exception):
                await queue.unsubscribe()

    async def _work(self, message: Msg) -> None:
        keeping = asyncio.create_task(_keep(message))
        identity = command_id(message)
        # A second copy, or a redelivery of what is in hand, waits for the first and then finds its outcome.
        turn = self._turns.setdefault(identity, asyncio.Lock())
        try:
            async with turn:
                await self._handle(message, identity)
        except asyncio.CancelledError:
            keeping.cancel()
            # We are stopping: whoever comes next gets it at once instead of after the ack wait.
            with suppress(NatsError):
                await message.nak()
            raise
        except Unavailable as e:
            # NATS is out for long. Unacknowledged, the command comes back when it returns.
            log.warning("a command is left to be delivered again", subject=message.subject, why=e.message)
        finally:
            keeping.cancel()
            self._slots.release()

    async def _handle(self, message: Msg, identity: str) -> None:
        verb_name = message.subject.rsplit(".", 1)[-1]
        delivered = message.metadata.num_delivered or 1
        with self._desk.at_work(message):
            outcome = await self._buckets.done.get_as(done_key(identity), Outcome)
            if outcome is None:
                template = f"cmd.{self._service}.{verb_name}"
                with telemetry.processing(template, message.headers, redelivered=delivered > 1) as span:
                    outcome = await self._carry_out(message, verb_name, identity, delivered)
                    if outcome.error is not None:
                        telemetry.failed(span, outcome.error.message)
                # Kept before it is acknowledged: whoever dies in between only finds it done.
                if await self._buckets.done.create(done_key(identity), outcome) is None:
                    outcome = await self._buckets.done.get_as(done_key(identity), Outcome) or outcome
            await self._desk.answer(message, outcome)
        # Unheard in an outage, the command comes again and finds its outcome in `done`.
        with suppress(NatsError):
            if outcome.error is not None and outcome.error.code == BadMessage.code:
                await message.term()
            else:
                await message.ack_sync(timeout=5)

    async def _carry_out(self, message: Msg, verb_name: str, identity: str, delivered: int) -> Outcome:
        result: object = None
        error: BaseException | None = None
        started_s = time.monotonic()
        try:
            verb, command = self._understand(message, verb_name)
            left_s = _left_s(command, verb, message.metadata.timestamp.timestamp(), clock.now_s())
            if left_s <= 0:
                raise Expired(
                    f"{verb_name} waited past its deadline for {self._service} of node {self._node} and was not "
                    "carried out; send it again"
                )
            if delivered > MAX_DELIVERIES:
                raise Failed(
                    f"{verb_name} was begun {delivered - 1} times and never finished; see the log of "
                    f"{self._service} on node {self._node}"
                )
            log.info("command", verb=verb_name, id=identity, delivered=delivered)
            result = await self._under_deadline(verb, command, identity, left_s)
        except ShoalError as e:
            error = e
        except Exception as e:  # noqa: BLE001  # the sender is owed an outcome; the log has the trace
            log.error("a command failed", exc=e, verb=verb_name, id=identity)
            error = e
        if isinstance(error, BadInput):
            await self._events.tell("rejected", subject=message.subject, reason=str(error))
        log.info(
            "command ended",
            verb=verb_name,
            id=identity,
            ok=error is None,
            took_s=round(time.monotonic() - started_s, 3),
            **({"why": str(error)} if error else {}),
        )
        return Outcome(
            id=identity,
            ok=error is None,
            node=self._node,
            service=self._service,
            verb=verb_name,
            result=msgspec.to_builtins(result) if result is not None else {},
            error=as_body(error) if error else None,
            ended_at_s=round(clock.now_s(), 3),
        )

    def _understand(self, message: Msg, verb_name: str) -> tuple[Verb, Command]:
        verb = self._verbs.get(verb_name)
        if verb is None:
            raise BadMessage(f"{self._service} has no command {verb_name!r}; it has {', '.join(sorted(self._verbs))}")
        return verb, decode(message.data, verb.kind)

    async def _under_deadline(self, verb: Verb, command: Command, identity: str, left_s: float) -> object:
        try:
            async with asyncio.timeout(left_s) as deadline:
                return await verb.handle(command, identity)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Expired(
                f"the command's deadline has passed on node {self._node}; what it began may still be going on: "
                "see `shoal status`"
            ) from None


def _left_s(command: Command, verb: Verb, stored_at_s: float, now_s: float) -> float:
    # It may have been stored long after it was sent, by a NATS that was away: then its sender's word counts.
    until_s = stored_at_s + (command.deadline_s or verb.deadline_s)
    return min(until_s, command.expires_at_s or until_s) - now_s


async def _keep(message: Msg) -> None:
    """Tell the queue that a long command is in hand, or it would be delivered again."""
    while True:
        await asyncio.sleep(ACK_WAIT_S / 3)
        with suppress(NatsError):
            await message.in_progress()
