"""`shoal hub`: settings with which huggingface_hub downloads from the cluster."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from shoal_cli.api.names import unknown_node
from shoal_cli.cli_context import CliContext
from shoal_cli.command_app import CommandHelp, new_app
from shoal_cli.commands import completion
from shoal_cli.commands.options import GatewayOption, HomeOption, JsonOption
from shoal_common.config import saved_node_id
from shoal_common.errors import Unavailable
from shoal_common.identity.api_key import API_KEY_VARIABLE, ensure_api_key
from shoal_common.messages.views import StatusView
from shoal_common.names import check_node

app = new_app()

_JSON = """For a shell: eval "$(shoal hub)"; `hf download org/name` and everything else that uses huggingface_hub then
downloads from the cluster. HF_TOKEN is the key of the node (`shoal key`); of another node than this home's it is
SHOAL_API_KEY. --json prints {"HF_ENDPOINT", "HF_TOKEN" if the key is known}."""


@app.command(cls=CommandHelp, epilog=_JSON)
def hub(
    ctx: typer.Context,
    node: Annotated[
        str,
        typer.Option(
            "--node",
            metavar="NODE",
            show_default=False,
            help="the node to download from (the local one)",
            autocompletion=completion.nodes,
        ),
    ] = "",
    as_json: JsonOption = False,
    gateway: GatewayOption = "",
    home: HomeOption = "",
) -> int:
    """Print settings for huggingface_hub to use the cluster."""
    cli = CliContext(ctx)
    status = cli.gateway.get("/v1/status", StatusView)
    name = check_node(node) if node else status.node
    settings, key = {"HF_ENDPOINT": hub_endpoint(status, name)}, _key_of(name, cli)
    authority = cli.home.root / "identity" / "ca.crt"
    if settings["HF_ENDPOINT"].startswith("https:") and authority.exists():
        settings["SSL_CERT_FILE"] = str(authority)
    if key:
        settings["HF_TOKEN"] = key
    else:
        cli.err.print(
            f"HF_TOKEN is left out: node {name} may want its key, which `shoal key` prints there; give it in "
            f"{API_KEY_VARIABLE}",
            soft_wrap=True,
        )
    if cli.as_json:
        return cli.print_json(settings)
    for name, value in settings.items():
        cli.print(f"export {name}={shlex.quote(value)}")
    return 0


def hub_endpoint(status: StatusView, name: str) -> str:
    """Return the URL of a node's fileserver. Raises NotFound, or Unavailable if it is down."""
    view = next((n for n in status.nodes if n.node == name), None)
    if view is None:
        raise unknown_node(status, name)
    service = view.services.get("fileserver")
    if service is None or not service.addresses:
        raise Unavailable(f"the fileserver of node {name} is not running: see `shoal status`")
    return f"{'https' if service.tls else 'http'}://{service.addresses[0]}"


def _key_of(name: str, cli: CliContext) -> str:
    if name == saved_node_id(cli.home.root):
        return ensure_api_key(cli.home.root)
    return cli.environ.get(API_KEY_VARIABLE, "").strip()
