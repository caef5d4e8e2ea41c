"""Parse a query of the event log and encode events as server-sent events. Pure.

    id: 4711                                                                an event
    data: {"sequence": 4711, "service": "storage", "node": "a", "event": "model_ready", "at_s": …, "fields": {…}}

    : nothing new                                                           every keep_alive_s
    id: 4719

    event: lost | reset | ended                                             a change of the stream itself
    id: 4700
    data: {"cursor": 4700, "message": "…", …}

`id` is the cursor: the sequence in the stream EVT up to which everything asked for has been sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal_common.bus.subjects import event
from shoal_common.errors import BadInput, BadMessage
from shoal_common.messages import decode
from shoal_common.names import SERVICES
from shoal_common.units import parse_duration_s

MAX_LAST = 10_000
"""Largest value of `last`."""
_EVENT = re.compile(r"[a-z][a-z_]{0,63}")
_MAX_CURSOR = 2**63
_MAX_TIME_S = 1e11
"""Unix times beyond this are taken for an error."""
_STARTS = ("after", "since", "last")
_KNOWN = (*_STARTS, "follow", "service", "node", "event")


class EventQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which events, and from where. At most one of `after`, `since_s` and `last` is set; none: from now on."""

    subject: str
    after: int | None = None
    """A cursor."""
    since_s: int | None = None
    """How long ago, in seconds."""
    last: int | None = None
    """Number of the latest events."""
    follow: bool = True
    """Whether to continue with new events, or to end with those stored."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a service, and its sequence in the log."""

    sequence: int
    service: str
    node: str
    event: str
    at_s: float
    fields: dict[str, Any]

    @property
    def cursor(self) -> int:
        """The cursor of a client that has received this."""
        return self.sequence


class KeepAlive(msgspec.Struct, frozen=True):
    """Nothing new up to this cursor; None while the cursor is not known yet."""

    cursor: int | None


class Gap(msgspec.Struct, frozen=True):
    """The log has discarded the events after `after`; reading resumes after `cursor`, with the oldest stored."""

    after: int
    cursor: int


class LogReset(msgspec.Struct, frozen=True):
    """The log was recreated and `after` is of the old one; reading resumes with the oldest event stored."""

    after: int
    cursor: int


StreamItem = Event | KeepAlive | Gap | LogReset


def parse_query(query: Mapping[str, str], last_event_id: str) -> EventQuery:
    """Parse a request's query and its header `Last-Event-ID`, which takes precedence: a client that reconnects
    repeats its first query. Raises BadInput naming the wrong parameter."""
    for name in query:
        if name not in _KNOWN:
            raise BadInput(f"unknown parameter {name[:40]!r}; known: {', '.join(_KNOWN)}", param=name[:40])
    given = [name for name in _STARTS if name in query]
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)} each set the start: give only one", param=given[1])
    begin: dict[str, int] = {}
    if last_event_id:
        begin["after"] = _number("Last-Event-ID", last_event_id, _MAX_CURSOR)
    elif "after" in query:
        begin["after"] = _number("after", query["after"], _MAX_CURSOR)
    elif "since" in query:
        since = query["since"]
        begin["since_s"] = parse_duration_s(f"{since}s" if since.isdigit() else since)
    elif "last" in query:
        begin["last"] = _number("last", query["last"], MAX_LAST)
    follow = query.get("follow", "true")
    if follow not in ("true", "false"):
        raise BadInput(f"follow is {follow[:40]!r}; give true or false", param="follow")
    return EventQuery(subject=_subject(query), follow=follow == "true", **begin)


def _number(name: str, text: str, limit: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > limit:
        raise BadInput(f"{name} is {text[:40]!r}; give a whole number from 0 to {limit}", param=name)
    return int(text)


def _subject(query: Mapping[str, str]) -> str:
    service, node, name = (query.get(key) or "*" for key in ("service", "node", "event"))
    if service not in ("*", *SERVICES):
        raise BadInput(f"unknown service {service[:40]!r}; known: {', '.join(SERVICES)}", param="service")
    if name != "*" and not _EVENT.fullmatch(name):
        raise BadInput(f"{name[:40]!r} is not the name of an event; docs/protocol.md lists them", param="event")
    return event(service, node, name)


def parse_event(subject: str, data: bytes, sequence: int, stored_at_s: float) -> Event:
    """Return a message of EVT as an event. Data that is not a JSON object becomes the field `text`."""
    *_, service, node, name = subject.split(".")
    try:
        fields = decode(data, dict[str, Any])
    except BadMessage:
        fields = {"text": data.decode(errors="replace")}
    at_s = fields.pop("at_s", None)
    if not isinstance(at_s, int | float) or not 0 <= at_s < _MAX_TIME_S:
        at_s = stored_at_s
    return Event(sequence=sequence, service=service, node=node, event=name, at_s=at_s, fields=fields)


def to_sse(item: StreamItem) -> bytes:
    """Return an item as one server-sent event."""
    match item:
        case Event():
            return _frame(item, item.sequence)
        case KeepAlive():
            return f": nothing new\n{_id_line(item.cursor)}\n".encode()
        case Gap(after=after, cursor=cursor):
            data = {
                "cursor": cursor,
                "after": after,
                "lost_first": after + 1,
                "lost_last": cursor,
                "message": f"events {after + 1} to {cursor} are no longer stored (seven days or 64 MiB are kept); "
                "continuing with the oldest stored; `shoal status` shows the current state",
            }
            return _frame(data, cursor, "lost")
        case LogReset(after=after, cursor=cursor):
            data = {
                "cursor": cursor,
                "after": after,
                "message": f"the event log was recreated after cursor {after} (NATS has lost its store); continuing "
                "with the oldest stored; `shoal status` shows the current state",
            }
            return _frame(data, cursor, "reset")


def end_event(cursor: int | None, reason: str) -> bytes:
    """Return the last event of a stream that the gateway ends."""
    return _frame({"cursor": cursor, "message": reason}, cursor, "ended")


def _frame(data: object, cursor: int | None, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}{_id_line(cursor)}data: ".encode() + msgspec.json.encode(data) + b"\n\n"


def _id_line(cursor: int | None) -> str:
    return "" if cursor is None else f"id: {cursor}\n"
