"""`shoal rm`."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal_cli.api.names import model_not_found, resolve_model
from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import GatewayOption, HomeOption, ModelArgument
from shoal_common.errors import BadInput, NotFound
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
    """Delete a model; refused while it is in use. A model that is not there is an error."""
    cli = CliContext(ctx)
    query = {"node": check_node(node)} if node else {}
    if revision and "@" in model:
        raise BadInput("the revision is given twice: after @ and with --revision")
    ref = ModelRef.parse(resolve_model(cli.gateway, model))
    if revision:
        ref = ModelRef.parse(f"{ref.repo}@{revision}")
    if "@" in str(ref):
        query["revision"] = ref.revision
    answer = cli.gateway.delete(f"/v1/models/{ref.repo}", JsonObject, **query)
    nodes = answer.get("nodes", {})
    if not answer.get("deleted", bool(nodes)):
        raise NotFound(f"{ref} is not on {node}") if node else model_not_found(cli.gateway, str(ref))
    cli.print(f"deleted {ref} on {', '.join(nodes)}")
    return 0
