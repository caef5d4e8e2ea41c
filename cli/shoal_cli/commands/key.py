"""`shoal key`: the key with which people and programs use this node."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption, JsonOption
from shoal_common.identity.api_key import ensure_api_key, replace_api_key

app = new_app()

_JSON = """OpenAI clients take it as their API key, browsers at /login, huggingface_hub as HF_TOKEN (`shoal hub`). On
Linux this user's own programs on this machine need none. --json prints {"key"}."""


@app.command(cls=CommandHelp, epilog=_JSON)
def key(
    ctx: typer.Context,
    new: Annotated[
        bool, typer.Option("--new", help="make a new one: the old one, and logins with it, end within seconds")
    ] = False,
    as_json: JsonOption = False,
    home: HomeOption = "",
) -> int:
    """Print the key of this node's gateway."""
    cli = CliContext(ctx)
    text = replace_api_key(cli.home.root) if new else ensure_api_key(cli.home.root)
    if cli.as_json:
        return cli.print_json({"key": text})
    cli.print(text)
    return 0
