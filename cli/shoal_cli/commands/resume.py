"""`shoal resume`."""

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

_JSON = """--json prints {"model", "nodes": {node: {"models": {model: "resumed", "under_way", "unknown", or the
phase it ended in}}}}. Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def resume(
    ctx: typer.Context,
    model: OptionalModelArgument = "",
    nodes: NodesOption = [],  # noqa: B006
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Continue paused downloads."""
    cli = CliContext(ctx)
    reject_together(ctx, node=nodes, all=all_nodes)
    return cli.finish(control_downloads(cli.gateway, "resume", model, nodes, all_nodes))
