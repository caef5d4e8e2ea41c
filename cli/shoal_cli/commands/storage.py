"""`shoal storage`: a node's disks and their settings, a dry run of eviction, pins."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer

from shoal_cli.api.client import GatewayClient
from shoal_cli.api.node_answers import NodeSelection, by_node, model_or_all_revisions, selected_storage
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
    Policy,
    select_nodes,
)
from shoal_cli.render.storage_text import plan_lines, storage_lines
from shoal_cli.render.tables import storage_table
from shoal_cli.render.units import parse_limit, parse_size, show_bytes, show_seconds
from shoal_common.durations import parse_duration_s
from shoal_common.errors import BadInput, NotFound
from shoal_common.messages.storage import EvictionPlan, StorageState

_JSON = """--json prints the API's answer. Fields are only ever added.
  show       {"node", "nodes": [{"node", "live", "disk_free_bytes", "storage": {…} or null}]}
  set        {"nodes": {node: {"max_storage_bytes", "eviction_policy", "headroom_bytes", "partial_retention_s",
             "libraries", "volumes", the limits of `shoal transfer`, "used_bytes", "overridden_by_env", "note"}}}
  plan       {"nodes": {node: {"required_bytes", "garbage", "garbage_bytes", "ended_downloads" and "victims":
             [{"model", "freed_bytes", "last_use_s"}], "freed_bytes", "enough", "evictable_bytes", "protected"}}}
  pin, unpin {"nodes": {node: {"models", "pinned"}}}"""

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
def set_(
    ctx: typer.Context,
    max_storage: Annotated[
        str | None,
        typer.Option(
            "--max-storage", metavar="SIZE", show_default=False, help="quota for models, like 200GB, or none"
        ),
    ] = None,
    eviction_policy: Annotated[
        Policy | None,
        typer.Option(
            "--eviction-policy",
            metavar="[manual|lru]",
            show_default=False,
            help="lru evicts old models for new ones, manual refuses new ones",
        ),
    ] = None,
    headroom: Annotated[
        str | None,
        typer.Option(
            "--headroom", metavar="SIZE", show_default=False, help="space to keep free on the disk, like 5GB"
        ),
    ] = None,
    partial_retention: Annotated[
        str | None,
        typer.Option(
            "--partial-retention",
            metavar="SPAN",
            show_default=False,
            help="keep data of abandoned downloads for this long (e.g. 7d; 0 = delete)",
        ),
    ] = None,
    libraries: Annotated[
        list[str],
        typer.Option(
            "--library",
            metavar="PATH",
            show_default=False,
            help="also serve the models in this directory, like ~/.cache/huggingface/hub: not copied, never written; "
            "repeatable",
        ),
    ] = [],  # noqa: B006
    remove_libraries: Annotated[
        list[str],
        typer.Option(
            "--remove-library", metavar="PATH", show_default=False, help="stop serving this directory; repeatable"
        ),
    ] = [],  # noqa: B006
    add_volumes: Annotated[
        list[str],
        typer.Option(
            "--add-volume",
            metavar="PATH",
            show_default=False,
            help="also store models in this directory of another disk; repeatable",
        ),
    ] = [],  # noqa: B006
    remove_volumes: Annotated[
        list[str],
        typer.Option(
            "--remove-volume",
            metavar="PATH",
            show_default=False,
            help="stop using this directory; its files stay, its models are not served; repeatable",
        ),
    ] = [],  # noqa: B006
    node: NodeOption = "",
    all_nodes: AllNodesOption = False,
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Change settings now and save them in node.toml. What is left out stays as it is."""
    cli, selection = CliContext(ctx), select_nodes(ctx)
    body = selection.body()
    if max_storage is not None:
        body["max_storage_bytes"] = parse_limit(max_storage)
    if eviction_policy is not None:
        body["eviction_policy"] = eviction_policy
    if headroom is not None:
        body["headroom_bytes"] = parse_size(headroom)
    if partial_retention is not None:
        body["partial_retention_s"] = parse_duration_s(partial_retention)
    if libraries or remove_libraries or add_volumes or remove_volumes:
        name, state = _state_of_one(cli.gateway, selection)
        if libraries or remove_libraries:
            kept = [library.path for library in state.libraries]
            body["libraries"] = _changed(kept, libraries, remove_libraries, f"a library of {name}")
        if add_volumes or remove_volumes:
            kept = [volume.path for volume in state.volumes]
            body["volumes"] = _changed(kept, add_volumes, remove_volumes, f"a volume of {name}")
    if body.keys() <= {"node"}:
        raise BadInput(
            "nothing to set: give --max-storage, --eviction-policy, --headroom, --partial-retention, --library, "
            "--remove-library, --add-volume or --remove-volume"
        )
    answer = cli.gateway.put("/v1/storage/config", body, JsonObject)
    lines = []
    for name, view in by_node(answer, SettingsView):
        quota = "none" if view.max_storage_bytes is None else show_bytes(view.max_storage_bytes)
        headroom_text = show_bytes(view.headroom_bytes)
        lines.append(f"{name}: quota {quota}, eviction policy {view.eviction_policy}, headroom {headroom_text}")
        if partial_retention is not None:
            lines.append(f"  data of abandoned downloads is kept for {show_seconds(view.partial_retention_s)}")
        lines += [f"  library {path}" for path in view.libraries]
        lines += [f"  volume {path}" for path in view.volumes]
        lines += [f"  {view.note}"] if view.note else []
    return cli.finish(CommandResult(answer, lines))


def _state_of_one(gateway: GatewayClient, selection: NodeSelection) -> tuple[str, StorageState]:
    """Return the one node that is selected and its storage. Raises BadInput, NotFound."""
    if selection.all_nodes:
        raise BadInput("libraries and volumes are set on one node at a time: give --node instead of --all")
    answer = selected_storage(gateway.get("/v1/storage", JsonObject), selection)
    [view] = msgspec.convert(answer, StorageListView).nodes
    if view.storage is None:
        raise NotFound(f"storage of node {view.node} is not known yet; see `shoal status`")
    return view.node, view.storage


def _changed(paths: list[str], add: list[str], remove: list[str], kind: str) -> list[str]:
    """Return the paths with some removed and some added. Raises BadInput for one that is not there to remove."""
    for path in remove:
        if path not in paths:
            raise BadInput(f"{path} is not {kind} (known: {', '.join(paths) or 'none'})")
    return list(dict.fromkeys([*(path for path in paths if path not in remove), *add]))


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
    cli, need_bytes = CliContext(ctx), parse_size(need)
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
    body = {**select_nodes(ctx).body(), "model": model_or_all_revisions(model), "pinned": pinned}
    answer = cli.gateway.post("/v1/storage/pins", body, JsonObject)
    text = "is pinned: never evicted or deleted" if pinned else "is no longer pinned"
    lines = []
    for name, view in by_node(answer, PinView):
        lines += [f"{name}: {m} {text}" for m in view.models] or [f"{name}: {model} {text}"]
    return cli.finish(CommandResult(answer, lines))
