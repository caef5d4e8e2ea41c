"""`shoal down`."""

from __future__ import annotations

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption
from shoal_cli.node import down as node_down

app = new_app()


@app.command(cls=CommandHelp)
def down(ctx: typer.Context, home: HomeOption = "") -> int:
    """Stop this machine's node."""
    cli = CliContext(ctx)
    result = node_down.down(cli.home)
    if result.was_running:
        cli.print(f"stopped the node in {cli.home.root} (supervisor pid {result.pid})")
    elif not result.orphans:
        cli.print(f"no node is running in {cli.home.root}")
    if result.orphans:
        cli.print(f"stopped processes left by a killed supervisor: pid {', '.join(map(str, result.orphans))}")
    return 0
