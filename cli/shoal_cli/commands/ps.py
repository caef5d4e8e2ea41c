"""`shoal ps`."""

from __future__ import annotations

import msgspec
import typer

from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import GatewayOption, HomeOption, JsonOption, QuietOption
from shoal_common.messages.views import InstanceView

app = new_app()

_JSON = """--json prints {"instances": [{"id", "model", "repo", "commit", "phase", "nodes", "tier", "is_low_memory",
"stages": [{"rank", "node", "first_layer", "last_layer", "phase", …}], "error"}]}. Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def ps(
    ctx: typer.Context,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """List the instances: models that are placed and answer."""
    from shoal_cli.render.tables import instances_table  # noqa: PLC0415

    cli = CliContext(ctx)
    answer = cli.gateway.get("/v1/instances", JsonObject)
    if cli.as_json:
        return cli.print_json({"instances": answer.get("instances", [])})
    instances = [msgspec.convert(i, InstanceView) for i in answer.get("instances", [])]
    if quiet:
        for instance in instances:
            cli.print(instance.id)
        return 0
    if instances:
        cli.draw(instances_table(instances))
    else:
        cli.print("nothing is running: `shoal run org/name` starts a model")
    return 0
