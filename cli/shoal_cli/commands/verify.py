"""`shoal verify`."""

from __future__ import annotations

import typer

from shoal_cli.api.node_answers import by_node
from shoal_cli.api.schema import VerifyView
from shoal_cli.api.verification import verify_nodes
from shoal_cli.cli_context import CliContext, CommandResult
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import (
    AllNodesOption,
    GatewayOption,
    HomeOption,
    JsonOption,
    NodeOption,
    OptionalModelArgument,
    select_nodes,
)
from shoal_cli.render.storage_text import suspect_instance_lines, verify_line
from shoal_common.errors import Corrupt

app = new_app()

_JSON = """--json prints {"nodes": {node: {"checked", "checked_bytes", "corrupt": [blob], "bad_leaves",
"missing": [blob], "models": [now incomplete], "instances": [of those models], "incomplete": [all]}}}.
The exit code is 8 when anything is corrupt, missing or incomplete. Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def verify(
    ctx: typer.Context,
    model: OptionalModelArgument = "",
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Hash what a node holds again and quarantine what is corrupt."""
    cli = CliContext(ctx)
    answer, lines, damaged = verify_nodes(cli.gateway, select_nodes(ctx), model), list[str](), False
    for name, view in by_node(answer, VerifyView):
        lines.append(verify_line(name, view))
        incomplete = sorted({*view.models, *view.incomplete})
        lines += [f"  {m} is incomplete: `shoal repair {m} --node {name}` repairs it" for m in incomplete]
        lines += suspect_instance_lines(view)
        damaged = damaged or bool(view.corrupt or view.missing or incomplete)
    return cli.finish(CommandResult(answer, lines, exit_code=Corrupt.exit_code if damaged else 0))
