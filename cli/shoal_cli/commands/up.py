"""`shoal up`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption, in_range
from shoal_cli.commands.setting_options import NONE_GIVEN, GivenSettings, refuse_missing, setting_options
from shoal_cli.node.node_plan import GATEWAY_PORT, READY_DEADLINE_S, UpOptions
from shoal_common.config import NATS_PORT
from shoal_common.errors import BadInput
from shoal_common.names import SERVICES, check_node
from shoal_common.settings.declaration import Value, settings_of
from shoal_common.settings.node import NodeSettings, StorageSettings
from shoal_common.settings.values import changeable, check_value
from shoal_common.units import parse_duration_s

app = new_app()

_OPTIONS = ("max_storage_bytes", "eviction_policy", "libraries")
"""The settings that the first start may set; `shoal storage set` has all."""


_DEFAULT = "default"
"""Typed in place of a value, it forgets what was kept."""


def _port_or_default(text: str) -> str:
    if text and text != _DEFAULT:
        if not (text.isascii() and text.isdigit()):
            raise typer.BadParameter(f"{text[:40]!r} is not a whole number")
        in_range(0, 65535)(int(text[:20]))
    return text


@app.command(cls=CommandHelp)
@setting_options(
    [s for s in changeable(StorageSettings) if s.key in _OPTIONS], note="; saved in node.toml", can_remove=False
)
def up(
    ctx: typer.Context,
    node: Annotated[
        str,
        typer.Option(
            "--node", metavar="NAME", show_default=False, help="the node's id, at its first start (host name)"
        ),
    ] = "",
    nats: Annotated[
        list[str],
        typer.Option(
            "--nats",
            metavar="URL",
            show_default=False,
            help="use this NATS server instead of running one; repeatable",
        ),
    ] = [],  # noqa: B006
    nats_port: Annotated[
        str,
        typer.Option(
            "--nats-port",
            metavar="PORT",
            callback=_port_or_default,
            show_default=False,
            help=f"port of this node's NATS, 0: any ({NATS_PORT})",
        ),
    ] = "",
    bind: Annotated[
        str,
        typer.Option(
            "--bind",
            metavar="ADDR",
            show_default=False,
            help="address to listen on (127.0.0.1)",
        ),
    ] = "",
    port: Annotated[
        str,
        typer.Option(
            "--port",
            metavar="PORT",
            callback=_port_or_default,
            show_default=False,
            help=f"the gateway's port, 0: any ({GATEWAY_PORT})",
        ),
    ] = "",
    given: GivenSettings = NONE_GIVEN,
    hub: Annotated[
        str,
        typer.Option("--hub", metavar="URL", show_default=False, help="hub instead of huggingface.co (HF_ENDPOINT)"),
    ] = "",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="run in the background; return once it is up")
    ] = False,
    wait: Annotated[
        str, typer.Option("--wait", metavar="SPAN", help="give up waiting after this long, like 30s or 5min")
    ] = f"{READY_DEADLINE_S:.0f}s",
    no_storage: Annotated[bool, typer.Option("--no-storage", help="do not run storage")] = False,
    no_fetcher: Annotated[bool, typer.Option("--no-fetcher", help="do not run the fetcher")] = False,
    no_fileserver: Annotated[bool, typer.Option("--no-fileserver", help="do not run the fileserver")] = False,
    no_placement: Annotated[bool, typer.Option("--no-placement", help="do not run placement")] = False,
    no_inference: Annotated[bool, typer.Option("--no-inference", help="do not run inference")] = False,
    no_gateway: Annotated[bool, typer.Option("--no-gateway", help="do not run the gateway")] = False,
    all_services: Annotated[
        bool, typer.Option("--all-services", help="run all services again, also those left out before")
    ] = False,
    only_nats: Annotated[
        bool, typer.Option("--only-nats", help="run NATS and let machines in; systemd or launchd runs the services")
    ] = False,
    home: HomeOption = "",
) -> int:
    """Run a node on this machine.

    What the options say about the node is kept in node.toml, and holds until it is said again: -d, --wait and
    --only-nats are of one run. `default` in place of a value forgets it.
    """
    from shoal_cli.node.up import up as run_up  # noqa: PLC0415

    cli = CliContext(ctx)
    refuse_missing(given.lists)
    options = UpOptions(
        home=str(cli.home.root),
        node=check_node(node) if node else "",
        node_values=_node_values(
            {"bind": bind, "nats": nats, "gateway_port": port, "nats_port": nats_port, "hub": hub},
            [service for service in SERVICES if ctx.params[f"no_{service}"]],
            all_services,
        ),
        values=given.values,
        added={change.setting.key: list(map(_absolute, change.added)) for change in given.lists},
        only_nats=only_nats,
        ready_deadline_s=parse_duration_s(wait),
    )
    return run_up(options, cli.environ, detach)


def _node_values(typed: Mapping[str, str | list[str]], without: list[str], all_services: bool) -> dict[str, Value]:
    """Return what was typed for settings of the node, checked; None where `default` was."""
    if without and all_services:
        raise BadInput(f"--all-services and --no-{without[0]} contradict each other: give one of them")
    values: dict[str, Value] = {}
    for setting in settings_of(NodeSettings):
        value = typed.get(setting.key)
        if value and setting.usage.flag:
            is_default = value in (_DEFAULT, [_DEFAULT])
            name = setting.usage.flag.name
            checked = None if is_default else check_value(setting, value, name)
            values[setting.key] = list(checked) if isinstance(checked, tuple) else checked
    return values | ({"without": list(without)} if without or all_services else {})


def _absolute(path: str) -> str:
    return path if path.startswith("~") else str(Path(path).absolute())
