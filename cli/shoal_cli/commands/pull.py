"""`shoal pull`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shoal_cli.api.downloads import ModelPull
from shoal_cli.api.hub_token import hand_over_token, with_reason
from shoal_cli.api.names import resolve_model
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import (
    GatewayOption,
    HomeOption,
    JsonOption,
    ModelArgument,
    reject_together,
)
from shoal_common.errors import Denied
from shoal_common.names import check_node

app = new_app()
INTERRUPTED = 130

_JSON = """--json prints nothing until the download has ended on every node, then {"downloads": [{"node", "model",
"phase", "commit", "total_bytes", "done_bytes", "verified_bytes", "resumed_bytes", "sources": {source: bytes},
"source_speeds": {source: bytes per second}, "eta_s", "source_switches": {source: times}, "error", …}],
"commands": {node: id}}. The exit code is that of the first node that failed. Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def pull(
    ctx: typer.Context,
    model: ModelArgument,
    nodes: Annotated[
        list[str],
        typer.Option(
            "--node",
            metavar="NODE",
            show_default=False,
            help="to this node; repeatable; default: the local one",
            autocompletion=completion.nodes,
        ),
    ] = [],  # noqa: B006
    all_nodes: Annotated[bool, typer.Option("--all", help="to every node that is up")] = False,
    force: Annotated[bool, typer.Option("--force", help="also a model that cannot run here, such as GGUF")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="send the request and return")] = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Download a model to a node.

    A gated or private one comes with your token: HF_TOKEN, or `hf auth login`. One whose weights are in a format that
    cannot run here is refused before any of it is downloaded.
    """
    from shoal_cli.render.progress_display import progress_display  # noqa: PLC0415

    cli = CliContext(ctx)
    reject_together(ctx, node=nodes, all=all_nodes)
    wanted = [check_node(n) for n in nodes]
    request = ModelPull(cli.gateway, resolve_model(cli.gateway, model))
    not_given = hand_over_token(
        cli.home, request.model, None if all_nodes else wanted, cli.has_own_gateway, cli.environ
    )
    try:
        request.request(wanted, all_nodes, force)
    except Denied as e:
        raise with_reason(e, not_given) from None
    if no_wait:
        if cli.as_json:
            return cli.print_json(request.to_json())
        cli.print(f"requested {request.model} on {', '.join(request.nodes)}; `shoal status` shows its progress")
        return 0
    try:
        with progress_display(cli.out, cli.as_json) as display:
            request.follow(display)
    except KeyboardInterrupt:
        print(
            f"\nthe download continues in the background: `shoal pull {request.model}` shows it again, "
            f"`shoal pause {request.model}` pauses it, `shoal cancel {request.model}` cancels it",
            file=sys.stderr,
        )
        return INTERRUPTED
    if cli.as_json:
        cli.print_json(request.to_json())
    for node, error in list(request.errors.items())[1:]:
        print(f"shoal: {node}: {error.message}", file=sys.stderr)
    for node, error in request.errors.items():
        explained = with_reason(error, not_given)
        raise type(error)(f"{node}: {explained.message}", **error.details)
    if not cli.as_json:
        cli.print(f"{request.model} is ready on {', '.join(request.nodes)}")
    return 0
