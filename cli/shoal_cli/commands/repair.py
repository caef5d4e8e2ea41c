"""`shoal repair`: verify, then pull incomplete models again on their nodes. Intact bytes are not fetched again."""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgspec
import typer

from shoal_cli.api.client import GatewayClient
from shoal_cli.api.downloads import ModelPull, ProgressDisplay
from shoal_cli.api.node_answers import NodeSelection, by_node
from shoal_cli.api.schema import JsonObject, VerifyView
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
from shoal_common.errors import ShoalError
from shoal_common.units import format_bytes, format_count

app = new_app()
INTERRUPTED = 130

_JSON = """--json prints what `shoal verify --json` does, and for each node "repaired": [models],
"fetched_bytes" and "errors": {model: {"code", "message"}}. The exit code is that of the first model that could not be
repaired. Fields are only ever added."""


class NodeRepair(msgspec.Struct):
    """What was done on one node."""

    models: list[str] = []
    fetched_bytes: int = 0
    errors: dict[str, ShoalError] = {}
    """What went wrong, by model."""


@app.command(cls=CommandHelp, epilog=_JSON)
def repair(
    ctx: typer.Context,
    model: OptionalModelArgument = "",
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Verify, then fetch only the damaged parts again."""
    from shoal_cli.render.progress_display import progress_display  # noqa: PLC0415

    cli, selection = CliContext(ctx), select_nodes(ctx)
    report: Callable[[str], None] = (lambda _: None) if cli.as_json else cli.print
    try:
        with progress_display(cli.out, cli.as_json) as display:
            result = repair_nodes(cli.gateway, selection, model, display, report)
    except KeyboardInterrupt:
        print("\nthe repair continues in the background: `shoal status` shows it", file=sys.stderr)
        return INTERRUPTED
    return cli.finish(result)


def repair_nodes(
    gateway: GatewayClient,
    selection: NodeSelection,
    model: str,
    display: ProgressDisplay,
    report: Callable[[str], None],
) -> CommandResult:
    """Verify, then repair node by node and model by model; `report` is given each node's verification at once.

    The exit code is that of the first model that could not be repaired.
    """
    answer = verify_nodes(gateway, selection, model)
    lines, codes = list[str](), list[int]()
    for node, view in by_node(answer, VerifyView):
        report(verify_line(node, view))
        done = NodeRepair()
        for incomplete in view.incomplete:
            _pull(gateway, node, incomplete, display, done)
        lines += [*repair_lines(node, view, done), *suspect_instance_lines(view)]
        answer["nodes"][node] |= _to_json(done)
        codes += [e.exit_code for e in done.errors.values()]
    return CommandResult(answer, lines, exit_code=codes[0] if codes else 0)


def _pull(gateway: GatewayClient, node: str, model: str, display: ProgressDisplay, done: NodeRepair) -> None:
    pull = ModelPull(gateway, model)
    try:
        pull.request([node], all_nodes=False)
        pull.follow(display)
    except ShoalError as e:
        done.errors[model] = e
        return
    if node in pull.errors:
        done.errors[model] = pull.errors[node]
    else:
        done.models.append(model)
    done.fetched_bytes += sum(pull.states[node].sources.values()) if node in pull.states else 0


def repair_lines(node: str, view: VerifyView, done: NodeRepair) -> list[str]:
    """Return what was damaged on a node and what became of it. Pure."""
    if not view.incomplete:
        return [f"{node}: nothing to repair"]
    damage = []
    if view.corrupt:
        damage.append(f"{format_count(view.bad_leaves, 'corrupt leaf')} in {format_count(len(view.corrupt), 'blob')}")
    if view.missing:
        damage.append(f"{format_count(len(view.missing), 'blob')} missing")
    lines = [f"{node}: {', '.join(damage) or 'incomplete from before'}; fetched {format_bytes(done.fetched_bytes)}"]
    lines += [f"  {model} is complete again" for model in done.models]
    return lines + [f"  {model} is still incomplete: {e.message}" for model, e in done.errors.items()]


def _to_json(done: NodeRepair) -> JsonObject:
    return {
        "repaired": done.models,
        "fetched_bytes": done.fetched_bytes,
        "errors": {model: {"code": e.code, "message": e.message} for model, e in done.errors.items()},
    }
