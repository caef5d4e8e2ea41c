"""The command worker: takes a service's commands from the work queue, runs each once, and always reports the outcome.

A service receives a command twice: stored, through the stream's consumer, which guarantees that it runs even if
every process dies meanwhile; and as the plain message, which carries the reply subject that the stream does not keep.
The `ReplyRouter` joins the two, so that `nats req` gets the outcome as its first reply (the stream sends no acks).
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

from shoal_common import telemetry
from shoal_common.bus import cluster_clock, subjects
from shoal_common.bus.connection import Nats
from shoal_common.bus.events import EventEmitter
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.bus.streams import COMMAND_MAX_AGE_S, retry_while_nats_down
from shoal_common.concurrency.cancellation import cancel_and_wait
from shoal_common.errors import BadInput, BadMessage, Expired, InternalError, ShoalError, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode
from shoal_common.messages.envelope import Command, Outcome
from shoal_common.rpc.outcomes import Outcomes, make_outcome
from shoal_common.rpc.reply_router import ReplyRouter, command_id

log = StructuredLogger("commands")

ACK_WAIT_S = 15.0
MAX_CONCURRENT_COMMANDS = 512
"""More than the downloads a fetcher runs, each of which holds a command: a `cancel` must not queue behind them."""
MAX_DELIVERIES = 10
_PULL_TIMEOUT_S = 300.0
_RETRY_INTERVAL_S = 1.0


class CommandHandler(msgspec.Struct, frozen=True):
    """A command of a service: its message, its handler and its default deadline."""

    message_type: type[Any]
    handler: Callable[[Any, str], Awaitable[object]]
    """Takes the command and its id; returns the result, raises ShoalError."""
    deadline_s: float


class CommandWorker:
    """Runs the commands of one service that are addressed to its node, or to `any` while it leads."""

    def __init__(
        self,
        nats: Nats,
        buckets: Buckets,
        events: EventEmitter,
        service: str,
        node: str,
        verbs: Mapping[str, CommandHandler],
    ) -> None:
        self._nats, self._events, self._outcomes = nats, events, Outcomes(buckets)
        self._service, self._node, self._verbs = service, node, verbs
        self._replies = ReplyRouter(nats, self._outcomes)
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_COMMANDS)
        self._jobs: set[asyncio.Task[None]] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, address: str, stopping: asyncio.Event) -> None:
        """Run commands until `stopping`. `address` is the node, or `any`. Unfinished commands return to the queue."""
        subject = subjects.all_commands(self._service, address)
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self._replies.listen(subject))
            pulling = tasks.create_task(
                self._pull_forever(subjects.consumer_name(self._service, address), subject, tasks)
            )
            await stopping.wait()
            await cancel_and_wait(listening, pulling)
            await cancel_and_wait(*self._jobs)

    async def _pull_forever(self, durable: str, subject: str, tasks: asyncio.TaskGroup) -> None:
        while True:
            try:
                await self._ensure_consumer(subject, durable)
                await self._pull(durable, tasks)
            except (NatsError, Unavailable) as e:
                log.debug("subscribing to commands again", reason=str(e) or type(e).__name__)
                await asyncio.sleep(_RETRY_INTERVAL_S)

    async def _ensure_consumer(self, subject: str, durable: str) -> None:
        wanted = api.ConsumerConfig(
            durable_name=durable,
            name=durable,  # the request's subject then states the filter: a server can refuse others' commands
            filter_subject=subject,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_ack_pending=MAX_CONCURRENT_COMMANDS,
            # A retired node's consumer expires (I8): the queue keeps the commands, not the consumer.
            inactive_threshold=COMMAND_MAX_AGE_S,
        )
        # add_consumer also updates the settings of an existing consumer.
        await retry_while_nats_down(lambda: self._nats.js.add_consumer("CMD", wanted))

    async def _pull(self, durable: str, tasks: asyncio.TaskGroup) -> None:
        connection = self._nats.reconnects.count
        queue = await self._nats.js.pull_subscribe_bind(durable=durable, stream="CMD")
        reconnected = asyncio.ensure_future(self._nats.reconnects.wait_after(connection))
        try:
            while True:
                await self._slots.acquire()
                fetching = asyncio.ensure_future(queue.fetch(1, timeout=_PULL_TIMEOUT_S))
                has_job = False
                try:
                    await asyncio.wait({fetching, reconnected}, return_when=asyncio.FIRST_COMPLETED)
                    if not fetching.done():
                        return  # a restarted server has lost our request
                    with suppress(NatsTimeoutError, jse.FetchTimeoutError):
                        for message in fetching.result():
                            job = tasks.create_task(self._run_one(message))
                            self._jobs.add(job)
                            job.add_done_callback(self._jobs.discard)
                            has_job = True
                finally:
                    await cancel_and_wait(fetching)
                    if not has_job:
                        self._slots.release()
        finally:
            await cancel_and_wait(reconnected)
            # A cancelled fetch leaves a request on the server that would swallow the next command.
            with suppress(Exception):
                await queue.unsubscribe()

    async def _run_one(self, message: Msg) -> None:
        extending = asyncio.create_task(_extend_ack_forever(message))
        identity = command_id(message)
        # A second copy, or a redelivery of a running command, waits for the first and then finds its outcome.
        lock = self._locks.setdefault(identity, asyncio.Lock())
        try:
            async with lock:
                await self._handle(message, identity)
        except asyncio.CancelledError:
            extending.cancel()
            # Stopping: another process gets the command at once, not only after the ack wait.
            with suppress(NatsError):
                await message.nak()
            raise
        except Unavailable as e:
            # A long NATS outage. The command is not acknowledged, so it is delivered again afterwards.
            log.warning("NATS is out; the command will be delivered again", subject=message.subject, reason=e.message)
        finally:
            extending.cancel()
            self._slots.release()

    async def _handle(self, message: Msg, identity: str) -> None:
        verb_name = message.subject.rsplit(".", 1)[-1]
        delivered = message.metadata.num_delivered or 1
        with self._replies.track(message):
            outcome = await self._outcomes.get(identity)
            if outcome is None:
                template = f"cmd.{self._service}.{verb_name}"
                with telemetry.processing(template, message.headers, redelivered=delivered > 1) as span:
                    outcome = await self._execute(message, verb_name, identity, delivered)
                    if outcome.error is not None:
                        telemetry.mark_failed(span, outcome.error.message)
                # Stored before the ack: if this process dies in between, the redelivery finds the outcome.
                outcome = await self._outcomes.record(outcome)
            await self._replies.send_outcome(message, outcome)
        # If an outage loses the ack, the command is delivered again and its outcome found in `done`.
        with suppress(NatsError):
            if outcome.error is not None and outcome.error.code == BadMessage.code:
                await message.term()
            else:
                await message.ack_sync(timeout=5)

    async def _execute(self, message: Msg, verb_name: str, identity: str, delivered: int) -> Outcome:
        result: object = None
        error: BaseException | None = None
        started_s = time.monotonic()
        try:
            verb, command = self._decode(message, verb_name)
            left_s = _remaining_s(command, verb, message.metadata.timestamp.timestamp(), cluster_clock.now_s())
            if left_s <= 0:
                raise Expired(
                    f"{verb_name} passed its deadline before {self._service} of node {self._node} received it and "
                    "was not run; send it again"
                )
            if delivered > MAX_DELIVERIES:
                raise InternalError(
                    f"{verb_name} was started {delivered - 1} times and never finished; see the log of "
                    f"{self._service} on node {self._node}"
                )
            log.debug("command started", verb=verb_name, id=identity, delivered=delivered)
            result = await self._run_with_deadline(verb, command, identity, left_s)
        except ShoalError as e:
            error = e
        except Exception as e:  # noqa: BLE001  # the sender is owed an outcome; the log has the trace
            log.error("command crashed", exc=e, verb=verb_name, id=identity)
            error = e
        if isinstance(error, BadInput):
            await self._events.emit("rejected", subject=message.subject, reason=str(error))
        log.info(
            "command ended",
            verb=verb_name,
            id=identity,
            ok=error is None,
            took_s=round(time.monotonic() - started_s, 3),
            **({"reason": str(error)} if error else {}),
        )
        return make_outcome(identity, self._service, self._node, verb_name, error or result)

    def _decode(self, message: Msg, verb_name: str) -> tuple[CommandHandler, Command]:
        verb = self._verbs.get(verb_name)
        if verb is None:
            raise BadMessage(f"{self._service} has no command {verb_name!r}; it has {', '.join(sorted(self._verbs))}")
        return verb, decode(message.data, verb.message_type)

    async def _run_with_deadline(
        self, verb: CommandHandler, command: Command, identity: str, left_s: float
    ) -> object:
        try:
            async with asyncio.timeout(left_s) as deadline:
                return await verb.handler(command, identity)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise Expired(
                f"the command passed its deadline on node {self._node}; what it started may still run: "
                "see `shoal status`"
            ) from None


def _remaining_s(command: Command, verb: CommandHandler, stored_at_s: float, now_s: float) -> float:
    # A NATS that was down may have stored it long after it was sent: then the sender's `expires_at_s` counts.
    until_s = stored_at_s + (command.deadline_s or verb.deadline_s)
    return min(until_s, command.expires_at_s or until_s) - now_s


async def _extend_ack_forever(message: Msg) -> None:
    """Extend the ack deadline of a running command, which would be delivered again otherwise."""
    while True:
        await asyncio.sleep(ACK_WAIT_S / 3)
        with suppress(NatsError):
            await message.in_progress()
