"""`shoal rm`."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import GatewayOption, HomeOption, ModelArgument
from shoal_common.errors import BadInput
from shoal_common.names import ModelRef, check_node

app = new_app()


@app.command(cls=CommandHelp)
def rm(
    ctx: typer.Context,
    model: ModelArgument,
    node: Annotated[
        str,
        typer.Option(
            "--node",
            metavar="NODE",
            show_default=False,
            help="only on this node; default: on every node",
            autocompletion=completion.nodes,
        ),
    ] = "",
    revision: Annotated[
        str,
        typer.Option("--revision", metavar="REV", show_default=False, help="a branch, tag or commit, as after @"),
    ] = "",
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Delete a model; refused while it is in use. Deleting an absent model succeeds."""
    cli = CliContext(ctx)
    ref = ModelRef.parse(model)
    query = {"node": check_node(node)} if node else {}
    if revision and "@" in model:
        raise BadInput("the revision is given twice: after @ and with --revision")
    if revision:
        ref = ModelRef.parse(f"{ref.repo}@{revision}")
    if "@" in str(ref):
        query["revision"] = ref.revision
    answer = cli.gateway.delete(f"/v1/models/{ref.repo}", JsonObject, **query)
    nodes = answer.get("nodes", {})
    if answer.get("deleted", bool(nodes)):
        cli.print(f"deleted {ref} on {', '.join(nodes)}")
    else:
        cli.print(f"{ref} is on no node" if not node else f"{ref} is not on {node}")
    return 0
