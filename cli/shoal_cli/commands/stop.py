"""`shoal stop`."""

from __future__ import annotations

import typer

from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import GatewayOption, HomeOption, InstanceArgument
from shoal_common.names import check_id

app = new_app()


@app.command(cls=CommandHelp)
def stop(ctx: typer.Context, instance: InstanceArgument, gateway: GatewayOption = "", home: HomeOption = "") -> int:
    """Stop an instance."""
    cli = CliContext(ctx)
    instance = check_id(instance)
    answer = cli.gateway.delete(f"/v1/instances/{instance}", JsonObject)
    cli.print(f"stopped {instance}" if answer.get("deleted", True) else f"{instance} was not running")
    return 0
