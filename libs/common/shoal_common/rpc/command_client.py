"""Sends commands, as `nats req` would, and waits for their outcomes.

A reply is lost when the service that owes it, or NATS, restarts; `done` has the outcome all the same. A command is
lost with a NATS that dies before storing it (nothing acknowledges it), so it is sent again under the same id after
each reconnection while its sender waits. An id runs once, however often it arrives.

A command whose service is down for DOWN_AFTER_S is cancelled: it ends with `node_down`, also in `done`, where the
service finds that when it is back.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress

import msgspec
from msgspec import structs
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError

from shoal_common import telemetry
from shoal_common.bus import cluster_clock, subjects
from shoal_common.bus.connection import Nats
from shoal_common.bus.kv_bucket import Buckets
from shoal_common.errors import BadMessage, Expired, ShoalError, Unavailable
from shoal_common.liveness.availability import is_live, node_down_error
from shoal_common.messages import decode, encode
from shoal_common.messages.envelope import Command, Outcome
from shoal_common.rpc.outcomes import Outcomes, make_outcome

_POLL_INTERVAL_S = 2.0
"""How often `done` is read: a NATS outage may lose the reply, but not the outcome."""
DOWN_AFTER_S = 15.0
"""How long a service may lack a key in `live`, as while it restarts, before it counts as down."""
_LAST_CHECK_TIMEOUT_S = 5.0


def new_command_id() -> str:
    """Return a new id for a command or a request."""
    return uuid.uuid4().hex


class PendingCommand(msgspec.Struct, frozen=True):
    """A command that was sent, or is about to be."""

    service: str
    node: str
    verb: str
    command: Command
    identity: str

    def failed_with(self, error: ShoalError) -> Outcome:
        """Return its outcome if nobody ran it."""
        return make_outcome(self.identity, self.service, self.node, self.verb, error)


class CommandClient:
    """Sends commands and waits for their outcomes."""

    def __init__(self, nats: Nats, buckets: Buckets) -> None:
        self._nats, self._buckets, self._outcomes = nats, buckets, Outcomes(buckets)

    def require_nats(self) -> None:
        """Raise Unavailable while NATS is down: what is sent then might run much later."""
        if not self._nats.connected:
            raise Unavailable("this node has lost NATS and is reconnecting; try again in a moment")

    async def send(
        self, service: str, node: str, verb: str, command: Command, identity: str, deadline_s: float
    ) -> Outcome:
        """Send a command under this id and return its outcome.

        A timeout, or a command that could not be sent, is an outcome too: never raises a ShoalError.
        """
        sent = PendingCommand(
            service, node, verb, structs.replace(command, expires_at_s=cluster_clock.now_s() + deadline_s), identity
        )
        try:
            async with asyncio.timeout(deadline_s):
                return await self._outcome(sent)
        except TimeoutError:
            error: ShoalError = await self._timeout_reason(sent, deadline_s)
        except NatsError as e:
            error = Unavailable(f"{verb} could not be sent to {service} of node {node}: NATS is down ({e})")
        except ShoalError as e:
            error = e
        return sent.failed_with(error)

    async def outcome(self, identity: str) -> Outcome | None:
        """Return the outcome of a command that anybody has sent; None if it has none."""
        return await self._outcomes.get(identity)

    async def _outcome(self, sent: PendingCommand) -> Outcome:
        self.require_nats()
        inbox = self._nats.client.new_inbox()
        replies = await self._nats.client.subscribe(inbox)
        reconnects, connection = self._nats.reconnects, -1
        down_since_s: float | None = None
        try:
            while True:
                if connection != reconnects.count and (connection < 0 or await self._queue_exists()):
                    connection, down_since_s = reconnects.count, None
                    await self._publish(sent, inbox)
                outcome = await self._reply(replies) or await self._read_outcome(sent)
                if outcome is not None:
                    return outcome
                if await self._is_down(sent):
                    down_since_s = down_since_s or time.monotonic()
                    if time.monotonic() - down_since_s >= DOWN_AFTER_S:
                        return await self._cancel(sent)
                else:
                    down_since_s = None
        finally:
            with suppress(NatsError):
                await replies.unsubscribe()

    async def _publish(self, sent: PendingCommand, inbox: str) -> None:
        with telemetry.sending(f"cmd.{sent.service}.{sent.verb}"):
            await self._nats.client.publish(
                subjects.command(sent.service, sent.node, sent.verb),
                encode(sent.command),
                reply=inbox,
                headers=telemetry.headers({"Nats-Msg-Id": sent.identity}),
            )

    async def _queue_exists(self) -> bool:
        """Return whether the queue exists: a NATS that lost its store has none until a service creates it again."""
        with suppress(NatsError):
            await self._nats.js.stream_info("CMD")
            return True
        return False

    async def _reply(self, replies: Subscription) -> Outcome | None:
        with suppress(NatsTimeoutError, BadMessage):
            return decode((await replies.next_msg(timeout=_POLL_INTERVAL_S)).data, Outcome)
        return None

    async def _read_outcome(self, sent: PendingCommand) -> Outcome | None:
        with suppress(Unavailable):
            return await self.outcome(sent.identity)
        return None

    async def _is_down(self, sent: PendingCommand) -> bool:
        with suppress(Unavailable, NatsError):
            return not await is_live(self._buckets, sent.service, sent.node)
        return False

    async def _cancel(self, sent: PendingCommand) -> Outcome:
        """Cancel a command whose service is down. The service finds that in `done`; if it was faster, it wins."""
        error = await node_down_error(self._buckets, sent.service, sent.node, sent.verb)
        return await self._outcomes.record(sent.failed_with(error))

    async def _timeout_reason(self, sent: PendingCommand, deadline_s: float) -> ShoalError:
        with suppress(TimeoutError, Unavailable, NatsError):
            async with asyncio.timeout(_LAST_CHECK_TIMEOUT_S):
                if self._nats.connected and not await is_live(self._buckets, sent.service, sent.node):
                    return await node_down_error(self._buckets, sent.service, sent.node, sent.verb)
        return Expired(
            f"{sent.verb} did not end within {deadline_s:.0f} s on {sent.service} of node {sent.node}; it may still "
            f"run: see `shoal status`, or ask GET /v1/commands/{sent.identity} later"
        )

    async def send_to_all(
        self, service: str, ids: Mapping[str, str], verb: str, command: Command, deadline_s: float
    ) -> dict[str, Outcome]:
        """Send one command to several nodes at once and return their outcomes; `ids` holds each node's command id."""
        async with asyncio.TaskGroup() as tasks:
            sent = {
                node: tasks.create_task(self.send(service, node, verb, command, identity, deadline_s))
                for node, identity in ids.items()
            }
        return {node: task.result() for node, task in sent.items()}
