"""`shoal invite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption, JsonOption
from shoal_common.errors import BadInput
from shoal_common.units import format_duration, parse_duration_s

app = new_app()

_DEADLINE_S = 20.0
_MAX_LIFETIME_S = 7 * 86400


@app.command(cls=CommandHelp)
def invite(
    ctx: typer.Context,
    lifetime: Annotated[
        str, typer.Option("--for", metavar="SPAN", help="how long the code can be used, like 10m or 2d")
    ] = "1h",
    file: Annotated[
        str,
        typer.Option("--file", metavar="FILE", show_default=False, help="write the code there, not on the screen"),
    ] = "",
    as_json: JsonOption = False,
    home: HomeOption = "",
) -> int:
    """Print a code that lets one machine into this node's cluster."""
    from shoal_cli.node.control import ControlRequest, InviteReply, ask  # noqa: PLC0415
    from shoal_common.host.private_files import replace_private  # noqa: PLC0415

    cli = CliContext(ctx, as_json)
    lifetime_s = parse_duration_s(lifetime)
    if not 0 < lifetime_s <= _MAX_LIFETIME_S:
        raise BadInput("--for is at most 7d: ask for another invitation later")
    request = ControlRequest(op="invite", lifetime_s=float(lifetime_s))
    reply = msgspec.json.decode(ask(cli.home, request, _DEADLINE_S), type=InviteReply)
    if cli.as_json:
        return cli.print_json(msgspec.to_builtins(reply))
    cli.print(f"on the other machine, within {format_duration(lifetime_s)}:")
    cli.print(f"    shoal join {reply.address}")
    if file:
        replace_private(Path(file), f"{reply.code}\n".encode())
        cli.print(f"with --code-file and a copy of {file}, which lets in one machine")
    else:
        cli.print("and enter this code, which lets in one machine:")
        cli.print(f"    {reply.code}")
    if reply.is_local:
        cli.print("this node listens on this machine only: `shoal up --bind 0.0.0.0` lets other machines reach it")
    return 0
