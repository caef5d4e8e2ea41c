"""Outcomes of commands as HTTP answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from shoal_common.bus.subjects import ANY
from shoal_common.errors import NodeDown, ShoalError, from_body
from shoal_common.messages.envelope import Command, Outcome
from shoal_common.rpc.command_client import new_command_id
from shoal_gateway.context import GatewayContext, gateway_of
from shoal_gateway.rest.http_json import cancel_on_disconnect


def with_details(error: ShoalError, **details: Any) -> ShoalError:
    """Return the same error with more details."""
    return type(error)(error.message, **{**error.details, **details})


def error_of(outcome: Outcome) -> ShoalError | None:
    """Return the error of an outcome, with the node and the command in its details; None for a success."""
    if outcome.ok or outcome.error is None:
        return None
    return with_details(from_body(outcome.error), node=outcome.node, command=outcome.id)


def raise_first_error(outcomes: Mapping[str, Outcome]) -> None:
    """Raise the first node's error, if any; its details say which other nodes succeeded."""
    for node, outcome in sorted(outcomes.items()):
        error = error_of(outcome)
        if error is not None:
            others = {n: o.ok for n, o in outcomes.items() if n != node}
            raise with_details(error, other_nodes_ok=others) if others else error


def results_by_node(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Return each node's result, with the command's id."""
    return {node: {**outcome.result, "command": outcome.id} for node, outcome in sorted(outcomes.items())}


def require_placement(gateway: GatewayContext) -> None:
    """Raise NodeDown where placement runs on no node."""
    if not gateway.snapshot().live_nodes("placement"):
        raise NodeDown("placement runs on no node; nothing was sent: start a node with `shoal up`")


async def send_to_leader(request: Request, verb: str, command: Command) -> tuple[Outcome, str]:
    """Send a command; return its successful outcome and its id. Raises its error, or NodeDown."""
    gateway = gateway_of(request)
    require_placement(gateway)
    identity, deadline_s = new_command_id(), gateway.settings.timeouts.outcome_s
    sending = gateway.sender.send("placement", ANY, verb, command, identity, deadline_s)
    outcome = await cancel_on_disconnect(request.receive, sending)
    error = error_of(outcome)
    if error is not None:
        raise error
    return outcome, identity
