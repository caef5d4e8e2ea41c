"""`shoal hub`: what lets huggingface_hub take models from the cluster."""

from __future__ import annotations

import shlex

from shoal_cli.client.answers import StatusAnswer
from shoal_common.credentials import derive
from shoal_common.errors import NotFound, Unavailable


def hub_settings(status: StatusAnswer, node: str, secret: str) -> dict[str, str]:
    """Environment variables for huggingface_hub. Raises NotFound for a strange node, Unavailable for a silent one."""
    wanted = node or status.node
    row = next((n for n in status.nodes if n.node == wanted), None)
    if row is None:
        raise NotFound(f"there is no node {wanted}: `shoal status` lists them")
    service = row.services.get("fileserver")
    if service is None or not service.addresses:
        raise Unavailable(f"the fileserver of node {wanted} does not run: see `shoal status`")
    settings = {"HF_ENDPOINT": f"http://{service.addresses[0]}"}
    return settings | ({"HF_TOKEN": derive(secret, "hub")} if secret else {})


def as_exports(settings: dict[str, str]) -> list[str]:
    """Lines that a shell evaluates."""
    return [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
