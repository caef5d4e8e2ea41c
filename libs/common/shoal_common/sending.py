"""Sends commands as anybody would with `nats req`, and waits for their outcomes.

A reply is lost when the service that owes it restarts, or NATS does; `done` has the outcome all the same.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from contextlib import suppress

from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError

from shoal_common import subjects, telemetry
from shoal_common.buckets import Buckets, done_key
from shoal_common.connection import Nats
from shoal_common.errors import BadMessage, Expired, ShoalError, Unavailable
from shoal_common.messages import decode, encode
from shoal_common.messages.commands import Command, Outcome

_LOOK_EVERY_S = 2.0
"""How often `done` is looked at: a reply may be lost in an outage of NATS, the outcome is not."""


def new_id() -> str:
    """A fresh id for a command or a request."""
    return uuid.uuid4().hex


class Sender:
    """Sends commands."""

    def __init__(self, nats: Nats, buckets: Buckets) -> None:
        self._nats, self._buckets = nats, buckets

    def require_nats(self) -> None:
        """Raise Unavailable while NATS is away: what would be sent then might be carried out much later."""
        if not self._nats.connected:
            raise Unavailable("this node has lost NATS and tries to reach it again; try again in a moment")

    async def outcome_of(
        self, service: str, node: str, verb: str, command: Command, identity: str, deadline_s: float
    ) -> Outcome:
        """Send a command under this id and return its outcome.

        When none comes in time, or it could not be sent, that is an outcome too: never raises a ShoalError.
        """
        try:
            async with asyncio.timeout(deadline_s):
                return await self._send(service, node, verb, command, identity)
        except TimeoutError:
            error: ShoalError = Expired(
                f"{verb} did not end within {deadline_s:.0f} s on {service} of node {node}; it may still go on: "
                f"see `shoal status`, or ask GET /v1/commands/{identity} later"
            )
        except NatsError as e:
            error = Unavailable(f"{verb} could not be sent to {service} of node {node}: NATS is away ({e})")
        except ShoalError as e:
            error = e
        return Outcome(id=identity, ok=False, node=node, service=service, verb=verb, error=error.body())

    async def _send(self, service: str, node: str, verb: str, command: Command, identity: str) -> Outcome:
        self.require_nats()
        client = self._nats.client
        inbox = client.new_inbox()
        replies = await client.subscribe(inbox, max_msgs=1)
        try:
            with telemetry.sending(f"cmd.{service}.{verb}"):
                await client.publish(
                    subjects.command(service, node, verb),
                    encode(command),
                    reply=inbox,
                    headers=telemetry.headers({"Nats-Msg-Id": identity}),
                )
            while True:
                with suppress(NatsTimeoutError, BadMessage):
                    return decode((await replies.next_msg(timeout=_LOOK_EVERY_S)).data, Outcome)
                with suppress(Unavailable):
                    outcome = await self._buckets.done.get_as(done_key(identity), Outcome)
                    if outcome is not None:
                        return outcome
        finally:
            with suppress(NatsError):
                await replies.unsubscribe()

    async def outcomes_of(
        self, service: str, ids: Mapping[str, str], verb: str, command: Command, deadline_s: float
    ) -> dict[str, Outcome]:
        """The same command to several nodes at once: `ids` has each node's command id."""
        async with asyncio.TaskGroup() as tasks:
            sent = {
                node: tasks.create_task(self.outcome_of(service, node, verb, command, identity, deadline_s))
                for node, identity in ids.items()
            }
        return {node: task.result() for node, task in sent.items()}
