"""`shoal transfer`: how fast nodes may download and send weights."""

from __future__ import annotations

import msgspec
import typer

from shoal_cli.api.node_answers import by_node, selected_storage
from shoal_cli.api.schema import JsonObject, SettingsView, StorageListView
from shoal_cli.cli_context import CliContext, CommandResult
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import (
    AllNodesOption,
    GatewayOption,
    HomeOption,
    JsonOption,
    NodeOption,
    select_nodes,
)
from shoal_cli.commands.setting_options import GivenSettings, flag_names, setting_options
from shoal_common.errors import BadInput
from shoal_common.settings.node import TransferSettings
from shoal_common.settings.values import changeable
from shoal_common.units import format_rate

_SETTINGS = changeable(TransferSettings)
_KEYS = ", ".join(f'"{setting.key}"' for setting in _SETTINGS)
_JSON = f"""--json prints the API's answer: show {{"node", "nodes": [{{"node", "live", "storage": {{…,
{_KEYS}, "overridden_by_env"}} or null}}]}}; set what
`shoal storage set --json` prints. RATE is bytes per second: 20MB, 500kB, none. Fields are only ever added."""

app = new_app()


@app.callback(invoke_without_command=True, epilog=_JSON, subcommand_metavar="[ACTION]")
def transfer(
    ctx: typer.Context,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show and change the rate limits of weight transfers."""
    return _show(ctx) if ctx.invoked_subcommand is None else 0


@app.command(cls=CommandHelp)
def show(
    ctx: typer.Context,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show the limits (default)."""
    return _show(ctx)


def _show(ctx: typer.Context) -> int:
    cli, selection = CliContext(ctx), select_nodes(ctx)
    answer = selected_storage(cli.gateway.get("/v1/storage", JsonObject), selection)
    lines = []
    for view in msgspec.convert(answer, StorageListView).nodes:
        if view.storage is not None:
            lines.append(limits_line(view.node, view.storage))
            overridden = set(view.storage.overridden_by_env)
            lines += [f"  {s.key} is set by the environment" for s in _SETTINGS if s.key in overridden]
    return cli.finish(CommandResult(answer, lines))


@app.command("set", cls=CommandHelp)
@setting_options(_SETTINGS)
def set_(
    ctx: typer.Context,
    given: GivenSettings,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Change limits now and save them in node.toml. What is left out stays as it is."""
    cli, selection = CliContext(ctx), select_nodes(ctx)
    if not given.values:
        raise BadInput(f"nothing to set: give {flag_names(_SETTINGS)}")
    answer = cli.gateway.put("/v1/storage/config", selection.body() | given.values, JsonObject)
    lines = [limits_line(name, view) for name, view in by_node(answer, SettingsView)]
    return cli.finish(CommandResult(answer, lines))


def limits_line(node: str, limits: TransferSettings) -> str:
    """Return a node's limits on one line. Pure."""
    upload, hub, peer = limits.max_upload_bytes_per_s, limits.max_hub_bytes_per_s, limits.max_peer_bytes_per_s
    return f"{node}: upload {_rate(upload)}, from the hub {_rate(hub)}, from each peer {_rate(peer)}"


def _rate(bytes_per_s: int | None) -> str:
    return "no limit" if bytes_per_s is None else format_rate(bytes_per_s)
