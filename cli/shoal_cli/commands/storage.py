"""`shoal storage`: a node's disks and their settings, a dry run of eviction, pins."""

from __future__ import annotations

import textwrap
import time
from typing import Annotated

import msgspec
import typer

from shoal_cli.api.names import known_model, resolve_model
from shoal_cli.api.node_answers import by_node, selected_storage
from shoal_cli.api.own_settings import own_node, set_on_own_node
from shoal_cli.api.schema import JsonObject, PinView, SettingsView, StorageListView
from shoal_cli.cli_context import CliContext, CommandResult
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import (
    AllNodesOption,
    GatewayOption,
    HomeOption,
    JsonOption,
    ModelArgument,
    NodeOption,
    select_nodes,
)
from shoal_cli.commands.setting_options import GivenSettings, flag_names, refuse_missing, setting_options
from shoal_cli.render.storage_text import plan_lines, storage_lines
from shoal_cli.render.tables import storage_table
from shoal_common.errors import BadInput
from shoal_common.messages.storage import EvictionPlan
from shoal_common.settings.declaration import Value
from shoal_common.settings.node import StorageSettings
from shoal_common.settings.values import changeable
from shoal_common.units import format_bytes, format_duration, parse_bytes

_SETTINGS = [setting for setting in changeable(StorageSettings) if setting.section == StorageSettings.section]
_KEYS = textwrap.fill(", ".join(f'"{setting.key}"' for setting in _SETTINGS), 90, subsequent_indent=" " * 13)
_JSON = f"""--json prints the API's answer. Fields are only ever added.
  show       {{"node", "nodes": [{{"node", "live", "disk_free_bytes", "storage": {{…}} or null}}]}}
  set        {{"nodes": {{node: {{the limits of `shoal transfer`, "used_bytes", "overridden_by_env", "note",
             {_KEYS}}}}}}}
  plan       {{"nodes": {{node: {{"required_bytes", "garbage", "garbage_bytes", "ended_downloads" and "victims":
             [{{"model", "freed_bytes", "last_use_s"}}], "freed_bytes", "enough", "evictable_bytes", "protected"}}}}}}
  pin, unpin {{"nodes": {{node: {{"models", "pinned"}}}}}}"""

app = new_app()


@app.callback(invoke_without_command=True, epilog=_JSON, subcommand_metavar="[ACTION]")
def storage(
    ctx: typer.Context,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show nodes' disks, and change their settings."""
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
    """Show settings, use and pins (default)."""
    return _show(ctx)


def _show(ctx: typer.Context) -> int:
    cli, selection = CliContext(ctx), select_nodes(ctx)
    answer = selected_storage(cli.gateway.get("/v1/storage", JsonObject), selection)
    views = msgspec.convert(answer, StorageListView).nodes
    return cli.finish(CommandResult(answer, storage_lines(views, time.time()), table=storage_table(views)))


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
    """Change settings now and save them in node.toml. What is left out stays as it is.

    Libraries and volumes are set on the node itself, by the user who runs it.
    """
    cli, selection = CliContext(ctx), select_nodes(ctx)
    if not given.values and not given.lists:
        raise BadInput(f"nothing to set: give {flag_names(_SETTINGS)}")
    if given.lists:
        name = own_node(cli.home, cli.gateway, selection, not cli.has_own_gateway)
        refuse_missing(given.lists)
        answer = set_on_own_node(cli.home, cli.gateway, name, lambda s: given.values | _changed_lists(given, s, name))
    else:
        answer = cli.gateway.put("/v1/storage/config", selection.body() | given.values, JsonObject)
    lines = []
    for name, view in by_node(answer, SettingsView):
        quota = "none" if view.quota_bytes is None else format_bytes(view.quota_bytes)
        headroom_text = format_bytes(view.headroom_bytes)
        lines.append(f"{name}: quota {quota}, eviction policy {view.eviction_policy}, headroom {headroom_text}")
        if "partial_retention_s" in given.values:
            lines.append(f"  data of abandoned downloads is kept for {format_duration(view.partial_retention_s)}")
        lines += [f"  library {path}" for path in view.libraries]
        lines += [f"  volume {path}" for path in view.volumes]
        lines += [f"  {view.note}"] if view.note else []
    lines += [answer["note"]] if "note" in answer else []
    return cli.finish(CommandResult(answer, lines))


def _changed_lists(given: GivenSettings, settings: StorageSettings, node: str) -> dict[str, Value]:
    return {c.setting.key: c.applied(getattr(settings, c.setting.name), node) for c in given.lists}


@app.command(cls=CommandHelp)
def plan(
    ctx: typer.Context,
    need: Annotated[str, typer.Option("--need", metavar="SIZE", help="space to make, like 50GB")],
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Show what would be evicted to free space; evict nothing."""
    cli, need_bytes = CliContext(ctx), parse_bytes(need)
    query = {"need_bytes": str(need_bytes), **select_nodes(ctx).body()}
    answer = cli.gateway.get("/v1/storage/plan", JsonObject, query)
    lines: list[str] = []
    for name, eviction in by_node(answer, EvictionPlan):
        lines += plan_lines(name, need_bytes, eviction, time.time())
    return cli.finish(CommandResult(answer, lines))


@app.command(cls=CommandHelp)
def pin(
    ctx: typer.Context,
    model: ModelArgument,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Never evict or delete a model."""
    return _pin(ctx, model, True)


@app.command(cls=CommandHelp)
def unpin(
    ctx: typer.Context,
    model: ModelArgument,
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Allow a pinned model to be evicted and deleted."""
    return _pin(ctx, model, False)


def _pin(ctx: typer.Context, model: str, pinned: bool) -> int:
    cli = CliContext(ctx)
    selection = select_nodes(ctx)
    model = resolve_model(cli.gateway, model)
    body = {**selection.body(), "model": model, "pinned": pinned}
    answer = cli.gateway.post("/v1/storage/pins", body, JsonObject)
    text = "is pinned: never evicted or deleted" if pinned else "is no longer pinned"
    views = by_node(answer, PinView)
    if not any(view.models for _, view in views):
        known_model(cli.gateway, model)
    lines = []
    for name, view in views:
        lines += [f"{name}: {m} {text}" for m in view.models] or [f"{name}: {model} is not on it"]
    return cli.finish(CommandResult(answer, lines))
