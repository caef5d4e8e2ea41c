"""`shoal restart`."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import HomeOption, one_of
from shoal_cli.node import down as node_down
from shoal_common.names import SERVICES

app = new_app()


@app.command(cls=CommandHelp)
def restart(
    ctx: typer.Context,
    service: Annotated[
        str,
        typer.Argument(
            metavar="SERVICE",
            help=", ".join((*SERVICES, "nats")),
            callback=one_of(*SERVICES, "nats"),
            autocompletion=completion.children,
        ),
    ],
    home: HomeOption = "",
) -> int:
    """Restart one service of this machine's node."""
    cli = CliContext(ctx)
    status = node_down.restart(cli.home, service)
    cli.print(f"{status.name} is running again, pid {status.pid}")
    return 0
