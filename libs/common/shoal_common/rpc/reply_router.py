"""Routes the outcome of a command to its requesters: the reply half of `command_worker.py`.

The plain message of a command has a reply subject and possibly no id; its stored copy starts the work. The two are
matched by id if there is one, else by subject and payload: identical commands are interchangeable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from shoal_common import telemetry
from shoal_common.bus import subjects
from shoal_common.bus.connection import Nats
from shoal_common.errors import BadName, ShoalError
from shoal_common.messages import DECODE_ERRORS, WireStruct, encode
from shoal_common.messages.envelope import Outcome
from shoal_common.names import check_id
from shoal_common.rpc.outcomes import Outcomes

_MAX_COMMANDS = 1024
_MAX_REQUESTERS = 64
_Key = tuple[str, bytes]


class _Identified(WireStruct):
    id: str = ""


def explicit_command_id(message: Msg) -> str:
    """Return the id that the sender gave a command, by header or in the body; "" if there is no valid one."""
    explicit_id = (message.headers or {}).get("Nats-Msg-Id", "")
    if not explicit_id:
        with suppress(*DECODE_ERRORS):
            explicit_id = msgspec.json.decode(message.data or b"{}", type=_Identified).id
    try:
        return check_id(explicit_id) if explicit_id else ""
    except BadName:
        return ""


def command_id(message: Msg) -> str:
    """Return the id of a stored command: the sender's, else its sequence in the stream, which redelivery keeps."""
    return explicit_command_id(message) or f"cmd-{message.metadata.sequence.stream}"


def _key(message: Msg) -> _Key:
    explicit_id = explicit_command_id(message)
    return ("id", explicit_id.encode()) if explicit_id else (message.subject, message.data)


class ReplyRouter:
    """Requesters by command. Beyond `_MAX_COMMANDS` commands, or `_MAX_REQUESTERS` of one, the oldest is dropped; it
    can still read the outcome in `done`.
    """

    def __init__(self, nats: Nats, outcomes: Outcomes) -> None:
        self._nats, self._outcomes = nats, outcomes
        self._waiting: dict[_Key, list[Msg]] = {}

    async def listen(self, subject: str) -> None:
        """Record requesters, until cancelled."""
        to_check: asyncio.Queue[tuple[_Key, str]] = asyncio.Queue(_MAX_COMMANDS)

        async def arrived(message: Msg) -> None:
            # Nothing is awaited here: the next requester has to be recorded before its command ends.
            if message.reply and not subjects.is_from_consumer(message.reply):
                key, explicit_id = self._record(message), explicit_command_id(message)
                if explicit_id and not to_check.full():
                    to_check.put_nowait((key, explicit_id))

        subscription = await self._nats.client.subscribe(subject, cb=arrived)
        try:
            while True:
                await self._reply_if_done(*await to_check.get())
        finally:
            with suppress(NatsError):
                await subscription.unsubscribe()

    def _record(self, message: Msg) -> _Key:
        key = _key(message)
        requesters = self._waiting.setdefault(key, [])
        requesters.append(message)
        del requesters[:-_MAX_REQUESTERS]
        if len(self._waiting) > _MAX_COMMANDS:
            self._waiting.pop(next(iter(self._waiting)))
        return key

    async def _reply_if_done(self, key: _Key, explicit_id: str) -> None:
        # A repeated id: the stream drops the copy, so only an existing outcome can be the reply.
        with suppress(ShoalError, NatsError):
            outcome = await self._outcomes.get(explicit_id)
            if outcome is not None:
                await self._send(key, outcome)

    @contextmanager
    def track(self, message: Msg) -> Iterator[None]:
        """Keep a running command's requesters, which may arrive before or after it; drop them at the end."""
        try:
            yield
        finally:
            self._waiting.pop(_key(message), None)

    async def send_outcome(self, message: Msg, outcome: Outcome) -> None:
        """Send an outcome to everyone who waits for this command."""
        await self._send(_key(message), outcome)

    async def _send(self, key: _Key, outcome: Outcome) -> None:
        for requester in self._waiting.pop(key, []):
            with suppress(NatsError):
                await self._nats.client.publish(requester.reply, encode(outcome), headers=telemetry.headers())
