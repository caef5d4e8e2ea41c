"""`shoal version`."""

from __future__ import annotations

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption
from shoal_common import VERSION

app = new_app()


@app.command(cls=CommandHelp)
def version(ctx: typer.Context, home: HomeOption = "") -> int:
    """Print the version."""
    CliContext(ctx).print(f"shoal {VERSION}")
    return 0
