"""`shoal status`."""

from __future__ import annotations

import typer

from shoal_cli.api.schema import JsonObject
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import GatewayOption, HomeOption, JsonOption
from shoal_common.errors import Unavailable
from shoal_common.messages.views import StatusView
from shoal_common.names import SERVICES

app = new_app()

_JSON = """--json prints GET /v1/status of the gateway as it is: {"node", "version",
"nats_connected", "nodes": [{"node", "live", "services": {name: {"version", "pid", "host", "uptime_s", "addresses"}},
"missing_services", "other_versions": {service: version},
"link", "memory_total_bytes", "memory_available_bytes", "storage": {…} or null}], "models": […],
"downloads": […], "instances": […]}. Fields are only ever added."""


@app.command(cls=CommandHelp, epilog=_JSON)
def status(
    ctx: typer.Context, as_json: JsonOption = False, gateway: GatewayOption = "", home: HomeOption = ""
) -> int:
    """Show nodes, disks, models, downloads and instances."""
    cli = CliContext(ctx)
    try:
        answer = cli.gateway.get("/v1/status", JsonObject)
    except Unavailable:
        _explain_missing_gateway(cli)
        raise
    if cli.as_json:
        return cli.print_json(answer)
    import msgspec  # noqa: PLC0415

    from shoal_cli.render.tables import render_status  # noqa: PLC0415

    cli.draw(render_status(msgspec.convert(answer, StatusView)))
    _print_own_node(cli)
    return 0


def _print_own_node(cli: CliContext) -> None:
    """Print what keeps this machine's services from their work, what its node was told, and what it has chosen."""
    from rich.text import Text  # noqa: PLC0415

    from shoal_cli.node.down import supervisor_status  # noqa: PLC0415
    from shoal_cli.node.startup_report import ports_text  # noqa: PLC0415

    node = supervisor_status(cli.home) if cli.has_own_gateway else None
    for child in node.children if node else []:
        if child.problem:
            cli.err.print(Text(f"{child.name}: {child.problem}", style="red"), soft_wrap=True)
    if node is None or not node.bind:
        return
    rows = {
        "bound to": node.bind,
        "ports": ports_text(node.ports),
        "NATS": "" if "nats" in node.ports else ", ".join(node.nats),
        "hub": node.hub,
        "left out": " ".join(s for s in SERVICES if s not in {c.name for c in node.children}),
        "kept": f"{', '.join(node.kept)} (`[node]` in node.toml)" if node.kept else "",
    }
    cli.print("\nthis node")
    for name, value in rows.items():
        if value:
            cli.print(f"  {name:9} {value}")


def _explain_missing_gateway(cli: CliContext) -> None:
    """Raise Unavailable naming the children that are not ready, when this home's supervisor runs."""
    from shoal_cli.node.children.restart_policy import not_ready_reason  # noqa: PLC0415
    from shoal_cli.node.down import supervisor_status  # noqa: PLC0415

    supervisor = supervisor_status(cli.home)
    if supervisor is None:
        return
    not_ready = [f"{c.name} ({not_ready_reason(c)})" for c in supervisor.children if c.phase != "ready" or c.problem]
    raise Unavailable(
        f"node {supervisor.node} is running (supervisor pid {supervisor.pid}), but its gateway does not answer; "
        f"not ready: {', '.join(not_ready) or 'nothing'}; see `shoal logs`"
    ) from None
