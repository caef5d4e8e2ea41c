"""`shoal logs`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import HomeOption, one_of
from shoal_cli.node.logs.log_reader import NAMES, follow_logs, last_lines

app = new_app()


@app.command(cls=CommandHelp)
def logs(
    ctx: typer.Context,
    service: Annotated[
        str,
        typer.Argument(
            metavar="[SERVICE]",
            show_default=False,
            help=f"{', '.join(NAMES)}; default: all",
            callback=one_of(*NAMES),
            autocompletion=completion.logs,
        ),
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="keep printing new lines")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", help="print the last N lines")] = 100,
    home: HomeOption = "",
) -> int:
    """Show the logs of this machine's node."""
    cli = CliContext(ctx)
    for text in last_lines(cli.home, service, max(lines, 0)):
        print(text)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for text in follow_logs(cli.home, service):
                print(text, flush=True)
    return 0
