"""`shoal node`: drain a node, forget it, or revoke its keys."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.api.names import known_nodes, node_not_found
from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import GatewayOption, HomeOption, NodeArgument
from shoal_common.names import check_node

app = new_app()

_REVOKE_DEADLINE_S = 25.0


@app.callback(subcommand_metavar="ACTION")
def node(gateway: GatewayOption = "", home: HomeOption = "") -> None:
    """Manage the cluster's nodes."""


@app.command(cls=CommandHelp)
def forget(ctx: typer.Context, node: NodeArgument, gateway: GatewayOption = "", home: HomeOption = "") -> int:
    """Remove a dead node's records. A node that returns publishes again what is on its disk."""
    cli = CliContext(ctx)
    node = check_node(node)
    answer = cli.gateway.delete(f"/v1/nodes/{node}", JsonObject)
    count = answer.get("key_count", 0)
    records = f"{count} {'record' if count == 1 else 'records'}"
    if not answer.get("found"):
        raise node_not_found(cli.gateway, node)
    cli.print(f"forgot {node}: {records} removed")
    return 0


@app.command(cls=CommandHelp)
def revoke(ctx: typer.Context, node: NodeArgument, home: HomeOption = "") -> int:
    """Take a node's keys away: nobody in the cluster hears or answers it any more. Needs the cluster's first node."""
    from shoal_cli.node.control import ControlRequest, ask  # noqa: PLC0415

    cli = CliContext(ctx)
    node = check_node(node)
    ask(cli.home, ControlRequest(op="revoke", node=node), _REVOKE_DEADLINE_S)
    cli.print(f"revoked {node}; `shoal node forget {node}` removes its records at once")
    return 0


@app.command(cls=CommandHelp)
def drain(
    ctx: typer.Context,
    node: NodeArgument,
    undo: Annotated[bool, typer.Option("--undo", help="allow it to run models again")] = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Run nothing on a node any more. Its instances move, as far as other nodes have memory; its models stay and are
    served."""
    cli = CliContext(ctx)
    [node] = known_nodes(cli.gateway, [node])
    if undo:
        answer = cli.gateway.delete(f"/v1/nodes/{node}/drain", JsonObject)
        cli.print(f"{node} runs models again" if answer.get("was_drained") else f"{node} was not drained")
        return 0
    answer = cli.gateway.post(f"/v1/nodes/{node}/drain", {}, JsonObject)
    moving = ", ".join(answer.get("instances", []))
    note = f"; {moving} will move as far as other nodes have memory: `shoal ps`" if moving else ""
    cli.print(f"drained {node}{note}")
    return 0
