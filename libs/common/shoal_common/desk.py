"""Where askers wait for the outcome of their command: the reply half of `commands.py`.

The plain message of a command brings a reply subject and, perhaps, no id; its stored copy brings the work. Copies
are matched by id where there is one, else by subject and payload: identical commands are interchangeable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from shoal_common import telemetry
from shoal_common.buckets import Buckets, done_key
from shoal_common.connection import Nats
from shoal_common.errors import BadName, ShoalError
from shoal_common.messages import Message, encode
from shoal_common.messages.commands import Outcome
from shoal_common.names import check_id

_MAX_WAITING = 1024
_MAX_ASKERS = 64
_Key = tuple[str, bytes]


class _Identified(Message):
    id: str = ""


def stated_id(message: Msg) -> str:
    """The id its sender gave a command, by header or in the body; "" for none (or none that is an id)."""
    stated = (message.headers or {}).get("Nats-Msg-Id", "")
    if not stated:
        with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            stated = msgspec.json.decode(message.data or b"{}", type=_Identified).id
    try:
        return check_id(stated) if stated else ""
    except BadName:
        return ""


def command_id(message: Msg) -> str:
    """The id of a stored command: the sender's, else its place in the stream, which redelivery keeps."""
    return stated_id(message) or f"cmd-{message.metadata.sequence.stream}"


def _key(message: Msg) -> _Key:
    stated = stated_id(message)
    return ("id", stated.encode()) if stated else (message.subject, message.data)


class Desk:
    """Who waits for which command. Bounded: past `_MAX_WAITING` commands, or `_MAX_ASKERS` of one, the oldest asker

    is dropped; `done` has it all.
    """

    def __init__(self, nats: Nats, buckets: Buckets) -> None:
        self._nats, self._buckets = nats, buckets
        self._waiting: dict[_Key, list[Msg]] = {}

    async def listen(self, subject: str) -> None:
        """Take note of askers, until cancelled."""
        seen: asyncio.Queue[tuple[_Key, str]] = asyncio.Queue(_MAX_WAITING)

        async def arrived(message: Msg) -> None:
            # Nothing is awaited here: the asker behind this one has to be noted before its command ends.
            if message.reply and not message.reply.startswith("$JS."):
                key, stated = self._note(message), stated_id(message)
                if stated and not seen.full():
                    seen.put_nowait((key, stated))

        subscription = await self._nats.client.subscribe(subject, cb=arrived)
        try:
            while True:
                await self._tell_if_done(*await seen.get())
        finally:
            with suppress(NatsError):
                await subscription.unsubscribe()

    def _note(self, message: Msg) -> _Key:
        key = _key(message)
        askers = self._waiting.setdefault(key, [])
        askers.append(message)
        del askers[:-_MAX_ASKERS]
        if len(self._waiting) > _MAX_WAITING:
            self._waiting.pop(next(iter(self._waiting)))
        return key

    async def _tell_if_done(self, key: _Key, stated: str) -> None:
        # The same id again: the stream drops the copy, so an outcome that is known is all it will get.
        with suppress(ShoalError, NatsError):
            outcome = await self._buckets.done.get_as(done_key(stated), Outcome)
            if outcome is not None:
                await self._tell(key, outcome)

    @contextmanager
    def at_work(self, message: Msg) -> Iterator[None]:
        """While a command is worked on, its askers may arrive before or after it; afterwards none are kept."""
        try:
            yield
        finally:
            self._waiting.pop(_key(message), None)

    async def answer(self, message: Msg, outcome: Outcome) -> None:
        """Give everyone who waits for this command its outcome."""
        await self._tell(_key(message), outcome)

    async def _tell(self, key: _Key, outcome: Outcome) -> None:
        for asker in self._waiting.pop(key, []):
            with suppress(NatsError):
                await self._nats.client.publish(asker.reply, encode(outcome), headers=telemetry.headers())
