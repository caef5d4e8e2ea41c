"""What may be asked of the log of events, and how it is told as server-sent events. Pure.

    id: 4711                                                                an event
    data: {"sequence": 4711, "service": "storage", "node": "a", "event": "model_ready", "at_s": …, "fields": {…}}

    : nothing new                                                           from time to time
    id: 4719

    event: lost | anew | ended                                              what happened to the stream itself
    id: 4700
    data: {"cursor": 4700, "message": "…", …}

`id` is the cursor: the place in the stream EVT up to which everything that was asked for has been told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from shoal_common.errors import BadInput, BadMessage
from shoal_common.messages import decode
from shoal_common.spans import parse_seconds
from shoal_common.subjects import SERVICES, event

LAST_LIMIT = 10_000
"""Most of the latest events that `last` may ask for."""
_EVENT = re.compile(r"[a-z][a-z_]{0,63}")
_MAX_CURSOR = 2**63
_FAR_S = 1e11
"""Later than any time that a calendar has: nobody meant it."""
_BEGINS = ("after", "since", "last")
_KNOWN = (*_BEGINS, "follow", "service", "node", "event")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Which events, and from where on. At most one of `after`, `since_s` and `last` is set; none: from now on."""

    subject: str
    after: int | None = None
    """A cursor."""
    since_s: int | None = None
    """How long ago, in seconds."""
    last: int | None = None
    """So many of the latest."""
    follow: bool = True
    """Whether to go on with what happens from now on, or to end with what there is."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What a service told, and where it stands in the log."""

    sequence: int
    service: str
    node: str
    event: str
    at_s: float
    fields: dict[str, Any]

    @property
    def cursor(self) -> int:
        """Where a client that has seen this goes on."""
        return self.sequence


class Quiet(msgspec.Struct, frozen=True):
    """Nothing that was asked for has happened up to here. None: it is not known yet where here is."""

    cursor: int | None


class Lost(msgspec.Struct, frozen=True):
    """The log has discarded what came after one cursor; it goes on after a later one, with the oldest it keeps."""

    after: int
    cursor: int


class Anew(msgspec.Struct, frozen=True):
    """The log is another one than that of this cursor; it begins with the oldest that this one keeps."""

    after: int
    cursor: int


Told = Event | Quiet | Lost | Anew


def read_asked(query: Mapping[str, str], last_event_id: str) -> Asked:
    """A request's query and its header `Last-Event-ID`, which counts before the query: a client that comes back
    sends the query it began with. Raises BadInput naming the parameter that is wrong."""
    for name in query:
        if name not in _KNOWN:
            raise BadInput(f"there is no parameter {name[:40]!r}; there are {', '.join(_KNOWN)}", param=name[:40])
    given = [name for name in _BEGINS if name in query]
    if len(given) > 1:
        raise BadInput(f"{' and '.join(given)} each say where to begin: give one of them", param=given[1])
    begin: dict[str, int] = {}
    if last_event_id:
        begin["after"] = _number("Last-Event-ID", last_event_id, _MAX_CURSOR)
    elif "after" in query:
        begin["after"] = _number("after", query["after"], _MAX_CURSOR)
    elif "since" in query:
        begin["since_s"] = parse_seconds(query["since"])
    elif "last" in query:
        begin["last"] = _number("last", query["last"], LAST_LIMIT)
    follow = query.get("follow", "true")
    if follow not in ("true", "false"):
        raise BadInput(f"follow is {follow[:40]!r}: say true or false", param="follow")
    return Asked(subject=_subject(query), follow=follow == "true", **begin)


def _number(name: str, text: str, limit: int) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or int(text) > limit:
        raise BadInput(f"{name} is {text[:40]!r}: give a whole number, 0 to {limit}", param=name)
    return int(text)


def _subject(query: Mapping[str, str]) -> str:
    service, node, name = (query.get(key) or "*" for key in ("service", "node", "event"))
    if service not in ("*", *SERVICES):
        raise BadInput(f"there is no service {service[:40]!r}; there are {', '.join(SERVICES)}", param="service")
    if name != "*" and not _EVENT.fullmatch(name):
        raise BadInput(f"{name[:40]!r} is no event's name; docs/protocol.md lists them", param="event")
    return event(service, node, name)


def read_event(subject: str, data: bytes, sequence: int, stored_at_s: float) -> Event:
    """A message of EVT. Whatever somebody has published there becomes an event: `text` is what is no JSON object."""
    *_, service, node, name = subject.split(".")
    try:
        fields = decode(data, dict[str, Any])
    except BadMessage:
        fields = {"text": data.decode(errors="replace")}
    at_s = fields.pop("at_s", None)
    if not isinstance(at_s, int | float) or not 0 <= at_s < _FAR_S:
        at_s = stored_at_s
    return Event(sequence=sequence, service=service, node=node, event=name, at_s=at_s, fields=fields)


def frame(told: Told) -> bytes:
    """One thing told, as it goes over the wire."""
    match told:
        case Event():
            return _frame(told, told.sequence)
        case Quiet():
            return f": nothing new\n{_place(told.cursor)}\n".encode()
        case Lost(after=after, cursor=cursor):
            said = {
                "cursor": cursor,
                "after": after,
                "lost_first": after + 1,
                "lost_last": cursor,
                "message": f"what the log held from {after + 1} to {cursor} is no longer kept: it holds seven days "
                "or 64 MiB; this goes on with the oldest there is, and `shoal status` shows what is now",
            }
            return _frame(said, cursor, "lost")
        case Anew(after=after, cursor=cursor):
            said = {
                "cursor": cursor,
                "after": after,
                "message": f"the log of events has begun anew since cursor {after} (NATS has lost its store); this "
                "goes on with the oldest there is, and `shoal status` shows what is now",
            }
            return _frame(said, cursor, "anew")


def farewell(cursor: int | None, why: str) -> bytes:
    """The last message of a stream that ends before its client wanted it to."""
    return _frame({"cursor": cursor, "message": why}, cursor, "ended")


def _frame(said: object, cursor: int | None, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}{_place(cursor)}data: ".encode() + msgspec.json.encode(said) + b"\n\n"


def _place(cursor: int | None) -> str:
    return "" if cursor is None else f"id: {cursor}\n"
