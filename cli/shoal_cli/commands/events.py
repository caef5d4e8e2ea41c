"""`shoal events`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Annotated, Any

import typer

from shoal_cli.api.event_stream import EventView, ServerSentEvent, decode_data, notice_text, stream_events
from shoal_cli.api.names import known_nodes
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import (
    GatewayOption,
    HomeOption,
    JsonOption,
    in_range,
    one_of,
    reject_together,
)
from shoal_common.logs import quote_value
from shoal_common.names import SERVICES, check_node
from shoal_common.units import parse_duration_s

app = new_app()
DEFAULT_LINES = 50

_JSON = """--json prints one line of JSON per event: {"sequence", "service", "node", "event", "at_s",
"fields": {…}}; and {"notice": "lost" or "reset", "cursor", "message", …} when the log could not continue from the
last event. Fields are only ever added; docs/protocol.md lists the events."""


@app.command(cls=CommandHelp, epilog=_JSON)
def events(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing new events")] = False,
    lines: Annotated[
        int | None,
        typer.Option(
            "--lines", "-n", metavar="N", callback=in_range(1), show_default=False, help="the last N events (50)"
        ),
    ] = None,
    since: Annotated[
        str,
        typer.Option(
            "--since", metavar="SPAN", show_default=False, help="events since this long ago, like 10m or 7d"
        ),
    ] = "",
    service: Annotated[
        str,
        typer.Option(
            "--service",
            metavar="SERVICE",
            show_default=False,
            help="only of this service",
            callback=one_of(*SERVICES),
            autocompletion=completion.services,
        ),
    ] = "",
    node: Annotated[
        str,
        typer.Option(
            "--node", metavar="NODE", show_default=False, help="only of this node", autocompletion=completion.nodes
        ),
    ] = "",
    event: Annotated[
        str,
        typer.Option("--event", metavar="EVENT", show_default=False, help="only of this kind, like model_ready"),
    ] = "",
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show what happened in the cluster."""
    cli = CliContext(ctx)
    reject_together(ctx, lines=lines, since=since)
    query = {"since": f"{parse_duration_s(since)}s"} if since else {"last": str(lines or DEFAULT_LINES)}
    query |= {"node": check_node(node)} if node else {}
    query |= {name: value for name, value in (("service", service), ("event", event)) if value}
    query |= {} if follow else {"follow": "false"}
    count = 0
    with contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext():
        for item in stream_events(lambda: cli.gateway, query, follow, _print_outage):
            count += not item.name
            _print(item, cli.as_json)
    if not count and not follow:
        # A node that is gone for good may still have events.
        known_nodes(cli.gateway, [node] if node else [])
        if not cli.as_json:
            print("no events", file=sys.stderr)
    return 0


def _print_outage(message: str) -> None:
    print(f"shoal: {message}; retrying until it answers", file=sys.stderr)


def _print(item: ServerSentEvent, as_json: bool) -> None:
    if item.name:
        if as_json:
            notice = {"notice": item.name, **decode_data(item, dict[str, Any])}
            print(json.dumps(notice, ensure_ascii=False), flush=True)
        else:
            print(f"shoal: {notice_text(item)}", file=sys.stderr, flush=True)
    elif as_json:
        print(item.data.decode(), flush=True)
    else:
        print(event_line(decode_data(item, EventView)), flush=True)


def event_line(event: EventView) -> str:
    """Return an event for a person: `2026-01-31 12:30:05  node-a  storage  model_ready  model=org/name size_bytes=7`.

    Whatever was published as an event, it stays one line and sends no control character to the terminal.
    """
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at_s))
    source = "  ".join(quote_value(word) for word in (event.node, event.service, event.event))
    fields = " ".join(f"{quote_value(name)}={quote_value(_plain(value))}" for name, value in event.fields.items())
    return f"{when}  {source}  {fields}".rstrip()


def _plain(value: object) -> object:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | bool) or value is None else value
