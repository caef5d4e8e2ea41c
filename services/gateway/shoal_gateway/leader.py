"""Having placement's leader carry a command out, wherever in the cluster it is."""

from __future__ import annotations

from starlette.requests import Request

from shoal_common.errors import NodeAway
from shoal_common.messages.commands import Command, Outcome
from shoal_common.sending import new_id
from shoal_common.subjects import ANY
from shoal_gateway.exchange import unless_gone
from shoal_gateway.gateway import Gateway, gateway_of
from shoal_gateway.outcomes import error_of


def require_placement(gateway: Gateway) -> None:
    """Raise NodeAway where no node could lead."""
    if not gateway.picture().nodes_with("placement"):
        raise NodeAway("placement is live on no node; nothing was sent: start it with `shoal up`")


async def carried_out(request: Request, verb: str, command: Command) -> tuple[Outcome, str]:
    """The good outcome of a command, and its id. Raises what it ended with, or NodeAway."""
    gateway = gateway_of(request)
    require_placement(gateway)
    identity, deadline_s = new_id(), gateway.settings.limits.outcome_s
    sending = gateway.sender.outcome_of("placement", ANY, verb, command, identity, deadline_s)
    outcome = await unless_gone(request.receive, sending)
    error = error_of(outcome)
    if error is not None:
        raise error
    return outcome, identity
