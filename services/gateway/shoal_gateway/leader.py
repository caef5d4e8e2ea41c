"""Send commands to placement's leader, on whichever node it is."""

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
    """Raise NodeDown where placement runs on no node."""
    if not gateway.picture().nodes_with("placement"):
        raise NodeAway("placement runs on no node; nothing was sent: start a node with `shoal up`")


async def carried_out(request: Request, verb: str, command: Command) -> tuple[Outcome, str]:
    """Send a command; return its successful outcome and its id. Raises its error, or NodeDown."""
    gateway = gateway_of(request)
    require_placement(gateway)
    identity, deadline_s = new_id(), gateway.settings.limits.outcome_s
    sending = gateway.sender.outcome_of("placement", ANY, verb, command, identity, deadline_s)
    outcome = await unless_gone(request.receive, sending)
    error = error_of(outcome)
    if error is not None:
        raise error
    return outcome, identity
