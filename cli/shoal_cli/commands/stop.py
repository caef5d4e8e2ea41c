"""`shoal stop`."""

from __future__ import annotations

import typer

from shoal_cli.api.names import resolve_instance
from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import GatewayOption, HomeOption, InstanceArgument

app = new_app()


@app.command(cls=CommandHelp)
def stop(ctx: typer.Context, instance: InstanceArgument, gateway: GatewayOption = "", home: HomeOption = "") -> int:
    """Stop an instance, by its id or its model."""
    cli = CliContext(ctx)
    instance = resolve_instance(cli.gateway, instance)
    answer = cli.gateway.delete(f"/v1/instances/{instance}", JsonObject)
    cli.print(f"stopped {instance}" if answer.get("deleted", True) else f"{instance} was not running")
    return 0
