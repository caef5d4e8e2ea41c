"""Verifying what nodes hold."""

from __future__ import annotations

from shoal_cli.api.client import GatewayClient
from shoal_cli.api.names import known_model, resolve_model
from shoal_cli.api.node_answers import NodeSelection
from shoal_cli.api.schema import JsonObject
from shoal_common.errors import NotFound

_VERIFY_TIMEOUT_S = 3700.0
"""The gateway waits an hour for a verification; its answer comes after that."""


def verify_nodes(gateway: GatewayClient, selection: NodeSelection, model: str) -> JsonObject:
    """Hash a model again, or everything (""), on the selected nodes. Returns when all of it is done.

    Raises NotFound.
    """
    body = selection.body()
    if model:
        body["model"] = resolve_model(gateway, model)
    try:
        return gateway.post("/v1/storage/verify", body, JsonObject, timeout_s=_VERIFY_TIMEOUT_S)
    except NotFound:
        if model:
            known_model(gateway, model)
        raise
