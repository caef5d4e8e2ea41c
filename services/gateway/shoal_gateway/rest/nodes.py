"""Endpoints of nodes: drain one, and forget one that is gone."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from shoal_common.messages.placement import Drain, Forget
from shoal_common.names import check_node
from shoal_gateway.context import gateway_of
from shoal_gateway.rest.command_results import send_to_leader
from shoal_gateway.rest.http_json import json_response
from shoal_gateway.rest.routing import route


async def forget(request: Request) -> Response:
    """`DELETE /v1/nodes/{node}`: delete every key that names a node which is down. An unknown node is no error."""
    gateway, node = gateway_of(request), check_node(request.path_params["node"])
    gateway.sender.require_nats()
    outcome, identity = await send_to_leader(request, "forget", Forget(node=node))
    return json_response({**outcome.result, "command": identity})


async def drain(request: Request) -> Response:
    """`POST /v1/nodes/{node}/drain`: place nothing on the node any more and move what runs there."""
    return await _drain(request, True)


async def undrain(request: Request) -> Response:
    """`DELETE /v1/nodes/{node}/drain`: allow placement on the node again."""
    return await _drain(request, False)


async def _drain(request: Request, drained: bool) -> Response:
    gateway, node = gateway_of(request), check_node(request.path_params["node"])
    gateway.sender.require_nats()
    outcome, identity = await send_to_leader(request, "drain", Drain(node=node, drained=drained))
    return json_response({**outcome.result, "command": identity})


ROUTES = [
    route("/v1/nodes/{node}", DELETE=forget),
    route("/v1/nodes/{node}/drain", POST=drain, DELETE=undrain),
]
