"""Nodes: having the cluster forget one that is gone."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from shoal_common.errors import NodeAway
from shoal_common.messages.commands import Forget
from shoal_common.names import check_node
from shoal_common.sending import new_id
from shoal_common.subjects import ANY
from shoal_gateway.exchange import reply, unless_gone
from shoal_gateway.gateway import gateway_of
from shoal_gateway.outcomes import error_of
from shoal_gateway.resource import resource


async def forget(request: Request) -> Response:
    """`DELETE /v1/nodes/{node}`: every key that names a node which is not live goes. Unknown already is no error."""
    gateway, node = gateway_of(request), check_node(request.path_params["node"])
    gateway.sender.require_nats()
    if not gateway.picture().nodes_with("placement"):
        raise NodeAway("placement is live on no node; nothing was sent: start it with `shoal up`")
    identity, deadline_s = new_id(), gateway.settings.limits.outcome_s
    sending = gateway.sender.outcome_of("placement", ANY, "forget", Forget(node=node), identity, deadline_s)
    outcome = await unless_gone(request.receive, sending)
    error = error_of(outcome)
    if error is not None:
        raise error
    return reply({**outcome.result, "command": identity})


ROUTES = [resource("/v1/nodes/{node}", DELETE=forget)]
