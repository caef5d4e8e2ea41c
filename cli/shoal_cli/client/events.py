"""`shoal events`: what has happened in the cluster, and what happens, through restarts of the gateway and of NATS."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from shoal_cli.client.gateway import Gateway
from shoal_common.errors import Busy, Expired, Failed, Unavailable
from shoal_common.logs import quote_value
from shoal_common.messages import Message
from shoal_common.names import check_node
from shoal_common.spans import parse_seconds

T = TypeVar("T")

_SILENCE_S = 60.0
"""The gateway gives a sign of life every `keep_alive_s`, 15 s; with none the connection is taken for dead."""
_RETRY_S = 1.0
_BROKE_OFF = (Unavailable, Expired, Busy)


class EventRow(Message):
    """An event, as the gateway tells it."""

    sequence: int
    service: str
    node: str
    event: str
    at_s: float = 0.0
    fields: dict[str, Any] = {}


class Told(msgspec.Struct, frozen=True):
    """One server-sent event: its name ("" for what happened in the cluster), its cursor, its data."""

    name: str
    cursor: str
    data: bytes


def tell(find: Callable[[], Gateway], args: argparse.Namespace) -> None:
    """Print the events asked for; with `follow` until a person has seen enough.

    `find` is asked at each connection: a gateway that was restarted may have another port. Raises what the gateway
    refuses with; once a stream has begun, a gateway that is away is waited for.
    """
    query = _query(args)
    cursor, begun, said = "", False, False
    while True:
        try:
            with find().follow("/events", _SILENCE_S, cursor, **query) as lines:
                begun = True
                for told in read(lines):
                    cursor, said = told.cursor or cursor, False
                    if told.name == "ended":
                        raise Unavailable(_message(told))
                    if told.data:
                        _print(told, args.as_json)
        except _BROKE_OFF as e:
            if not (begun and args.follow):
                raise
            if not said:
                print(f"shoal: {e.message}; going on as soon as it can be had", file=sys.stderr)
            said = True
        else:
            if not args.follow:
                return
        time.sleep(_RETRY_S)


def _query(args: argparse.Namespace) -> dict[str, str]:
    query = {"last": str(args.lines)}
    if args.since:
        query = {"since": f"{parse_seconds(args.since)}s"}
    if args.node:
        query["node"] = check_node(args.node)
    query |= {name: value for name in ("service", "event") if (value := getattr(args, name))}
    return query if args.follow else {**query, "follow": "false"}


def read(lines: Iterator[str]) -> Iterator[Told]:
    """Lines of a stream as server-sent events; one without data only moves the cursor."""
    name, cursor, data = "", "", ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            yield Told(name, cursor, data.encode())
            name, cursor, data = "", "", ""
        elif field == "event":
            name = value
        elif field == "id":
            cursor = value
        elif field == "data":
            data += value


def _print(told: Told, as_json: bool) -> None:
    if told.name:
        if as_json:
            print(json.dumps({"notice": told.name, **_decoded(told, dict[str, Any])}, ensure_ascii=False), flush=True)
        else:
            print(f"shoal: {_message(told)}", file=sys.stderr, flush=True)
    elif as_json:
        print(told.data.decode(), flush=True)
    else:
        print(line(_decoded(told, EventRow)), flush=True)


def line(row: EventRow) -> str:
    """An event for a person: `2026-01-31 12:30:05  node-a  storage  model_ready  model=org/name size_bytes=7`.

    Whatever somebody published as an event, it stays one line and says nothing to the terminal.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.at_s))
    who = "  ".join(quote_value(word) for word in (row.node, row.service, row.event))
    fields = " ".join(f"{quote_value(name)}={quote_value(_plain(value))}" for name, value in row.fields.items())
    return f"{when}  {who}  {fields}".rstrip()


def _plain(value: object) -> object:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | bool) or value is None else value


def _message(told: Told) -> str:
    return str(_decoded(told, dict[str, Any]).get("message", told.name))


def _decoded(told: Told, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(told.data, type=kind)
    except msgspec.MsgspecError as e:
        raise Failed(f"the gateway tells what is no event ({e}): check `shoal version` on both sides") from None
