"""`shoal join`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption
from shoal_common.errors import BadInput
from shoal_common.names import check_node

app = new_app()

_MAX_CODE_BYTES = 1000


@app.command(cls=CommandHelp)
def join(
    ctx: typer.Context,
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="what `shoal invite` printed there: host:4222")],
    code_file: Annotated[
        str,
        typer.Option("--code-file", metavar="FILE", show_default=False, help="the file with the code; -: stdin"),
    ] = "",
    node: Annotated[
        str,
        typer.Option(
            "--node", metavar="NAME", show_default=False, help="the id of this node, if it has none (host name)"
        ),
    ] = "",
    home: HomeOption = "",
) -> int:
    """Join the cluster of another machine.

    It asks for the code that `shoal invite` printed there. Then start this node with `shoal up`.
    """
    from shoal_cli.membership.invite_code import parse_code  # noqa: PLC0415
    from shoal_cli.membership.join import join as join_cluster  # noqa: PLC0415
    from shoal_cli.node_home import RunLock  # noqa: PLC0415
    from shoal_common.config import NATS_PORT, ensure_node_id  # noqa: PLC0415
    from shoal_common.identity.node_identity import NodeIdentity  # noqa: PLC0415

    cli = CliContext(ctx)
    host, port = _host_and_port(address, NATS_PORT)
    code = parse_code(_read_code(code_file))
    lock = RunLock(cli.home)
    lock.acquire()
    try:
        name = ensure_node_id(cli.home.root, check_node(node) if node else None)
        if node and name != node:
            raise BadInput(f"the node in {cli.home.root} is named {name} and keeps that name (I8): omit --node")
        identity = NodeIdentity(cli.home.root, name)
        cluster = join_cluster(identity, cli.home.root, host, port, code, cli.environ)
    finally:
        lock.release()
    cli.print(f"node {name} belongs to the cluster of {cluster} now: start it with `shoal up`")
    return 0


def _host_and_port(address: str, default: int) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname or "", parts.port or default
    except ValueError:
        host, port = "", 0
    if not host or "@" in address:
        raise BadInput(f"{address[:80]!r} is not an address: write it as `shoal invite` printed it, like host:4222")
    return host, port


def _read_code(file: str) -> str:
    if file == "-":
        return sys.stdin.read(_MAX_CODE_BYTES)
    if not file:
        # Not an argument: every user of the machine can read those.
        return str(typer.prompt("code"))
    try:
        with Path(file).open() as f:
            return f.read(_MAX_CODE_BYTES)
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{file} cannot be read: {getattr(e, 'strerror', None) or 'it is not text'}") from None
