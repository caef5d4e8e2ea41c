"""`shoal transfer`: how fast nodes may download and send weights."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from shoal_cli.api.node_answers import by_node, selected_storage
from shoal_cli.api.schema import JsonObject, SettingsView, StorageListView
from shoal_cli.cli_context import CliContext, CommandResult
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import (
    AllNodesOption,
    GatewayOption,
    HomeOption,
    JsonOption,
    NodeOption,
    select_nodes,
)
from shoal_cli.render.units import parse_rate, show_rate
from shoal_common.errors import BadInput

_UPLOAD, _HUB, _PEER = "max_upload_bytes_per_s", "max_hub_bytes_per_s", "max_peer_bytes_per_s"

_JSON = """--json prints the API's answer: show {"node", "nodes": [{"node", "live", "storage": {…,
"max_upload_bytes_per_s", "max_hub_bytes_per_s", "max_peer_bytes_per_s", "overridden_by_env"} or null}]}; set what
`shoal storage set --json` prints. RATE is bytes per second: 20MB, 500kB, none. Fields are only ever added."""

app = new_app()


@app.callback(invoke_without_command=True, epilog=_JSON, subcommand_metavar="[ACTION]")
def transfer(
    ctx: typer.Context,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show and change the rate limits of weight transfers."""
    return _show(ctx) if ctx.invoked_subcommand is None else 0


@app.command(cls=CommandHelp)
def show(
    ctx: typer.Context,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show the limits (default)."""
    return _show(ctx)


def _show(ctx: typer.Context) -> int:
    cli, selection = CliContext(ctx), select_nodes(ctx)
    answer = selected_storage(cli.gateway.get("/v1/storage", JsonObject), selection)
    lines = []
    for view in msgspec.convert(answer, StorageListView).nodes:
        if view.storage is not None:
            s = view.storage
            lines.append(
                limits_line(view.node, s.max_upload_bytes_per_s, s.max_hub_bytes_per_s, s.max_peer_bytes_per_s)
            )
            lines += [f"  {n} is set by the environment" for n in s.overridden_by_env if n in (_UPLOAD, _HUB, _PEER)]
    return cli.finish(CommandResult(answer, lines))


@app.command("set", cls=CommandHelp)
def set_(
    ctx: typer.Context,
    max_upload: Annotated[
        str | None,
        typer.Option(
            "--max-upload-rate",
            metavar="RATE",
            show_default=False,
            help="for sending to all other nodes together, like 20MB, or none",
        ),
    ] = None,
    max_hub: Annotated[
        str | None,
        typer.Option("--max-hub-rate", metavar="RATE", show_default=False, help="for downloading from the hub"),
    ] = None,
    max_peer: Annotated[
        str | None,
        typer.Option(
            "--max-peer-rate", metavar="RATE", show_default=False, help="for downloading from each other node"
        ),
    ] = None,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Change limits now and save them in node.toml. What is left out stays as it is."""
    cli, selection = CliContext(ctx), select_nodes(ctx)
    given = {_UPLOAD: max_upload, _HUB: max_hub, _PEER: max_peer}
    limits = {name: parse_rate(text) for name, text in given.items() if text is not None}
    if not limits:
        raise BadInput("nothing to set: give --max-upload-rate, --max-hub-rate or --max-peer-rate")
    answer = cli.gateway.put("/v1/storage/config", selection.body() | limits, JsonObject)
    lines = [
        limits_line(name, view.max_upload_bytes_per_s, view.max_hub_bytes_per_s, view.max_peer_bytes_per_s)
        for name, view in by_node(answer, SettingsView)
    ]
    return cli.finish(CommandResult(answer, lines))


def limits_line(node: str, upload: int | None, hub: int | None, peer: int | None) -> str:
    """Return a node's limits on one line. Pure."""
    return f"{node}: upload {show_rate(upload)}, from the hub {show_rate(hub)}, from each peer {show_rate(peer)}"
