"""The gateway's event stream, followed through restarts of the gateway and of NATS."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from shoal_cli.api.client import GatewayClient
from shoal_common.errors import Busy, Expired, InternalError, Unavailable
from shoal_common.messages import DECODE_ERRORS, WireStruct

T = TypeVar("T")

_SILENCE_TIMEOUT_S = 60.0
"""The gateway sends a keep-alive every `keep_alive_s`, 15 s; a stream silent for this long is dead."""
_RETRY_INTERVAL_S = 1.0
_DISCONNECTED = (Unavailable, Expired, Busy)


class EventView(WireStruct):
    """An event, as the gateway sends it."""

    sequence: int
    service: str
    node: str
    event: str
    at_s: float = 0.0
    fields: dict[str, Any] = {}


class ServerSentEvent(msgspec.Struct, frozen=True):
    """One server-sent event: its name ("" for an event of the cluster), its cursor, its data."""

    name: str
    cursor: str
    data: bytes


def stream_events(
    connect: Callable[[], GatewayClient], query: dict[str, str], follow: bool, on_retry: Callable[[str], None]
) -> Iterator[ServerSentEvent]:
    """Yield the events that `query` selects; with `follow` for ever.

    `connect` is called for each connection: a restarted gateway may have another port. Raises the gateway's refusal;
    once a stream has begun, an unreachable gateway is retried, and `on_retry` is called once per outage.
    """
    cursor, begun, in_outage = "", False, False
    while True:
        try:
            with connect().follow("/events", _SILENCE_TIMEOUT_S, cursor, **query) as lines:
                begun = True
                for event in parse_events(lines):
                    cursor, in_outage = event.cursor or cursor, False
                    if event.name == "ended":
                        raise Unavailable(notice_text(event))
                    if event.data:
                        yield event
        except _DISCONNECTED as e:
            if not (begun and follow):
                raise
            if not in_outage:
                on_retry(e.message)
            in_outage = True
        else:
            if not follow:
                return
        time.sleep(_RETRY_INTERVAL_S)


def parse_events(lines: Iterator[str]) -> Iterator[ServerSentEvent]:
    """Yield the server-sent events of a stream's lines; one without data only moves the cursor."""
    name, cursor, data = "", "", ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            yield ServerSentEvent(name, cursor, data.encode())
            name, cursor, data = "", "", ""
        elif field == "event":
            name = value
        elif field == "id":
            cursor = value
        elif field == "data":
            data += value


def notice_text(event: ServerSentEvent) -> str:
    """Return what a notice of the gateway says to a person."""
    return str(decode_data(event, dict[str, Any]).get("message", event.name))


def decode_data(event: ServerSentEvent, kind: type[T]) -> T:
    """Return an event's data. Raises Failed when it is not of this kind."""
    try:
        return msgspec.json.decode(event.data, type=kind)
    except DECODE_ERRORS as e:
        raise InternalError(
            f"the gateway sent an invalid event ({e}): compare `shoal version` on both sides"
        ) from None
