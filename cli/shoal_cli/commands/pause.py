"""`shoal pause`."""

from __future__ import annotations

import typer

from shoal_cli.api.download_control import control_downloads
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import (
    AllNodesOption,
    GatewayOption,
    HomeOption,
    JsonOption,
    NodesOption,
    OptionalModelArgument,
    reject_together,
)

app = new_app()

_JSON = """--json prints {"model", "nodes": {node: {"models": {model: "paused", "was_paused", "unknown", or the
phase it ended in}}}}. Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def pause(
    ctx: typer.Context,
    model: OptionalModelArgument = "",
    nodes: NodesOption = [],  # noqa: B006
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Pause downloads; only `shoal resume` continues them."""
    cli = CliContext(ctx)
    reject_together(ctx, node=nodes, all=all_nodes)
    return cli.finish(control_downloads(cli.gateway, "pause", model, nodes, all_nodes))
