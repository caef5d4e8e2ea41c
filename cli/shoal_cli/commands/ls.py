"""`shoal ls`, which is also `shoal models`."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import GatewayOption, HomeOption, JsonOption, QuietOption
from shoal_common.messages.placement import FittingModels
from shoal_common.messages.views import StatusView

app = new_app()

JSON_HELP = """--json prints {"models": [{"model", "repo", "commit", "nodes": [node], "size_bytes",
"library_directory": {node: directory of a library}}], and,
where models have lost files, "incomplete": {node: [model]}}; with --fits {"models": [{"model", "size_bytes", "tier":
"fits", "tight", "force" or "", "preview": as in `shoal place --preview`, or null, "reason"}]}. Fields are only ever
added."""


@app.command(cls=CommandHelp, epilog=JSON_HELP)
def ls(
    ctx: typer.Context,
    fits: Annotated[
        bool, typer.Option("--fits", help="also show which could be placed now, the largest first")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """List the models that nodes hold."""
    from shoal_cli.render.tables import fits_table, incomplete_lines, models_table  # noqa: PLC0415

    cli = CliContext(ctx)
    if fits:
        return cli.render(cli.gateway.get("/v1/placements/fits", FittingModels), fits_table)
    answer = cli.gateway.get("/v1/status", JsonObject)
    if cli.as_json:
        states = {n["node"]: n.get("storage") or {} for n in answer.get("nodes", [])}
        incomplete = {node: models for node, s in states.items() if (models := s.get("incomplete"))}
        return cli.print_json(
            {"models": answer.get("models", []), **({"incomplete": incomplete} if incomplete else {})}
        )
    status = msgspec.convert(answer, StatusView)
    if quiet:
        for repo in dict.fromkeys(model.repo for model in status.models):
            cli.print(repo)
        return 0
    incomplete_models = incomplete_lines(status)
    for line in incomplete_models:
        cli.print(line)
    if status.models:
        down = {n.node for n in status.nodes if not n.live}
        cli.draw(models_table(status.models, down))
    elif not incomplete_models:
        cli.print("no node holds a model yet: `shoal pull org/name` downloads one")
    return 0
