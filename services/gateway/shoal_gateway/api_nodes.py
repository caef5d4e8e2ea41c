"""Nodes: having the cluster forget one that is gone."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from shoal_common.messages.commands import Forget
from shoal_common.names import check_node
from shoal_gateway.exchange import reply
from shoal_gateway.gateway import gateway_of
from shoal_gateway.leader import carried_out
from shoal_gateway.resource import resource


async def forget(request: Request) -> Response:
    """`DELETE /v1/nodes/{node}`: every key that names a node which is not live goes. Unknown already is no error."""
    gateway, node = gateway_of(request), check_node(request.path_params["node"])
    gateway.sender.require_nats()
    outcome, identity = await carried_out(request, "forget", Forget(node=node))
    return reply({**outcome.result, "command": identity})


ROUTES = [resource("/v1/nodes/{node}", DELETE=forget)]
