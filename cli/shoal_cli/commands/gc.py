"""`shoal gc`."""

from __future__ import annotations

import typer

from shoal_cli.api.node_answers import by_node
from shoal_cli.api.schema import GarbageView, JsonObject
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
from shoal_common.units import format_bytes, format_count

app = new_app()

_JSON = """--json prints {"nodes": {node: {"freed_bytes", "blobs"}}}. Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def gc(
    ctx: typer.Context,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Delete data that no model and no download needs."""
    cli = CliContext(ctx)
    answer = cli.gateway.post("/v1/storage/gc", select_nodes(ctx).body(), JsonObject)
    lines = []
    for name, view in by_node(answer, GarbageView):
        freed = f"deleted {format_count(view.blobs, 'blob')}, {format_bytes(view.freed_bytes)} freed"
        lines.append(f"{name}: {freed if view.blobs or view.freed_bytes else 'nothing to delete'}")
    return cli.finish(CommandResult(answer, lines))
