"""`shoal rebalance`."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from shoal_cli.api.names import resolve_instance
from shoal_cli.api.placement import wait_ready
from shoal_cli.api.schema import RebalancedInstanceView
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import GatewayOption, HomeOption, JsonOption
from shoal_common.errors import BadInput
from shoal_common.messages.placement import Rebalances

app = new_app()

_JSON = """Nothing moves by itself. --json prints {"rebalances": [{"instance", "model", "current" and
"proposed": as in `shoal place --preview`, "gain"}]}; with INSTANCE the instance as in GET /v1/instances/{id}, and
"moved". Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def rebalance(
    ctx: typer.Context,
    instance: Annotated[
        str,
        typer.Argument(
            metavar="[INSTANCE]",
            show_default=False,
            help="move this one, by id or model; it does not answer meanwhile",
            autocompletion=completion.instances,
        ),
    ] = "",
    layout: Annotated[
        str,
        typer.Option("--layout", metavar="LAYOUT", show_default=False, help="to this layout; default: the best"),
    ] = "",
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show which instances have a better placement, or move one."""
    cli = CliContext(ctx)
    if not instance:
        if layout:
            raise BadInput("--layout needs an instance: `shoal rebalance INSTANCE --layout LAYOUT`")
        from shoal_cli.render.tables import rebalances_table  # noqa: PLC0415

        return cli.render(cli.gateway.get("/v1/placements/rebalances", Rebalances), rebalances_table)
    path = f"/v1/instances/{resolve_instance(cli.gateway, instance)}/rebalance"
    moved = cli.gateway.post(path, {"layout": layout}, RebalancedInstanceView)
    if moved.moved:
        wait_ready(cli.gateway, moved, lambda text: print(text, file=sys.stderr))
    if cli.as_json:
        return cli.print_json(msgspec.to_builtins(moved))
    nodes = ", ".join(moved.nodes)
    cli.print(f"instance {moved.id} is ready on {nodes}" if moved.moved else f"{moved.id} stays on {nodes}")
    return 0
