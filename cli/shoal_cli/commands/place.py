"""`shoal place`."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import msgspec
import typer

from shoal_cli.api import placement
from shoal_cli.api.names import known_nodes, resolve_model
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import (
    GatewayOption,
    HomeOption,
    JsonOption,
    ModelArgument,
    in_range,
    reject_together,
)
from shoal_common.messages.placement import Previews

app = new_app()

_JSON = """Objectives: latency, the best speed of one answer at a time; throughput, of --in-flight answers together;
balanced, of as many answers as the instance has stages.

--json prints the instance as in GET /v1/instances/{id}; with --preview what GET
/v1/placements/preview answers: {"model", "context_tokens", "estimated", "previews": [{"layout", "tier",
"is_low_memory", "stages": [{"node", "first_layer", "last_layer", "needed_bytes", "available_bytes", "tight_bytes",
"total_bytes", "bytes_to_free", "link_s", "link_measured"}], "tokens_per_s", "first_token_s", "fetch_bytes"}]}. Fields
are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def place(
    ctx: typer.Context,
    model: ModelArgument,
    exactly: Annotated[
        int | None,
        typer.Option(
            "--nodes", metavar="N", callback=in_range(1), show_default=False, help="over exactly this many nodes"
        ),
    ] = None,
    at_least: Annotated[
        int | None,
        typer.Option(
            "--min-nodes", metavar="N", callback=in_range(1), show_default=False, help="over at least this many nodes"
        ),
    ] = None,
    nodes: Annotated[
        list[str],
        typer.Option(
            "--node",
            metavar="NODE",
            show_default=False,
            help="only on this node; repeatable",
            autocompletion=completion.nodes,
        ),
    ] = [],  # noqa: B006
    without: Annotated[
        list[str],
        typer.Option(
            "--without",
            metavar="NODE",
            show_default=False,
            help="not on this node; repeatable",
            autocompletion=completion.nodes,
        ),
    ] = [],  # noqa: B006
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="TOKENS", callback=in_range(1), show_default=False, help="context length to reserve"
        ),
    ] = None,
    objective: Annotated[
        Literal["latency", "throughput", "balanced"],
        typer.Option("--objective", metavar="OBJECTIVE", help="latency, throughput or balanced; see below"),
    ] = "latency",
    in_flight: Annotated[
        int | None,
        typer.Option(
            "--in-flight",
            metavar="N",
            callback=in_range(1),
            show_default=False,
            help="concurrent answers to optimize for (4)",
        ),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            metavar="N",
            callback=in_range(1),
            help="memory for N answers of full context length; more answers share it",
        ),
    ] = 1,
    layout: Annotated[
        str,
        typer.Option("--layout", metavar="LAYOUT", show_default=False, help="this layout, as in --preview: a:14,b:2"),
    ] = "",
    allow_low_memory: Annotated[bool, typer.Option("--allow-low-memory", help="also count memory in use")] = False,
    force: Annotated[bool, typer.Option("--force", help="also use the safety reserve")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="show the possible layouts; place nothing")] = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Split a model over the nodes' memory and start it."""
    cli = CliContext(ctx)
    reject_together(ctx, nodes=exactly, min_nodes=at_least)
    client = cli.gateway
    named, excluded = known_nodes(client, nodes), known_nodes(client, without)
    model = resolve_model(client, model)
    body = placement.placement_request(model, exactly, at_least, named, context or 0)
    optional: dict[str, Any] = {
        "excluded_nodes": excluded,
        "objective": objective if objective != "latency" else "",
        "in_flight": in_flight,
        "max_parallel_answers": parallel if parallel != 1 else 0,
        "layout": layout,
        "allow_low_memory": allow_low_memory,
        "force": force,
    }
    body |= {name: value for name, value in optional.items() if value}
    if preview:
        from shoal_cli.render.tables import previews_table  # noqa: PLC0415

        answer = cli.gateway.get("/v1/placements/preview", Previews, placement.preview_query(body))
        return cli.render(answer, previews_table)
    from shoal_cli.render.line_editor import confirm  # noqa: PLC0415

    ask = confirm if sys.stdin is not None and sys.stdin.isatty() and not cli.as_json else None
    instance = placement.place(cli.gateway, body, lambda text: print(text, file=sys.stderr), ask)
    if cli.as_json:
        return cli.print_json(msgspec.to_builtins(instance))
    cli.print(f"instance {instance.id} is ready on {', '.join(instance.nodes)}")
    return 0
