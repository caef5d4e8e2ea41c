"""`shoal leave`."""

from __future__ import annotations

import typer

from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands.options import HomeOption
from shoal_common.errors import Refused

app = new_app()


@app.command(cls=CommandHelp)
def leave(ctx: typer.Context, home: HomeOption = "") -> int:
    """Take this node out of the cluster that it joined. Its models stay on its disk."""
    from shoal_cli.membership.join import leave as leave_cluster  # noqa: PLC0415
    from shoal_cli.membership.operator_files import OperatorFiles  # noqa: PLC0415
    from shoal_cli.node_home import RunLock  # noqa: PLC0415
    from shoal_common.config import cluster_servers, ensure_node_id, read_settings_file  # noqa: PLC0415
    from shoal_common.identity.node_identity import NodeIdentity  # noqa: PLC0415

    cli = CliContext(ctx)
    if OperatorFiles(cli.home.root).exists:
        raise Refused(f"the node in {cli.home.root} started its cluster, which ends with it: nothing to leave")
    lock = RunLock(cli.home)
    lock.acquire()
    try:
        node = ensure_node_id(cli.home.root)
        identity = NodeIdentity(cli.home.root, node)
        if not identity.is_member:
            cli.print(f"node {node} belongs to no cluster")
            return 0
        servers = cluster_servers(read_settings_file(cli.home.root))
        problem = leave_cluster(identity, cli.home.root, servers)
    finally:
        lock.release()
    cli.print(f"node {node} has left its cluster")
    if problem:
        cli.print(f"the cluster was not told ({problem}): run `shoal node revoke {node}` on its first node")
    return 0
