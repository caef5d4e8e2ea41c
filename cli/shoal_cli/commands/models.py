"""`shoal models`: another name of `shoal ls`."""

from __future__ import annotations

from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.ls import JSON_HELP, ls

app = new_app()
app.command(cls=CommandHelp, epilog=JSON_HELP, short_help="The same as `shoal ls`.")(ls)
