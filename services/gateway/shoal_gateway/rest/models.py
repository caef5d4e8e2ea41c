"""Endpoints of models: list and delete."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from shoal_common.errors import BadInput
from shoal_common.messages.envelope import Outcome
from shoal_common.messages.storage import Delete
from shoal_common.names import ModelRef
from shoal_common.rpc.command_client import new_command_id
from shoal_gateway.cluster.openai_models import get_model, list_models
from shoal_gateway.context import GatewayContext, gateway_of
from shoal_gateway.rest.command_results import raise_first_error, results_by_node
from shoal_gateway.rest.http_json import cancel_on_disconnect, json_response
from shoal_gateway.rest.node_selection import select_delete_nodes
from shoal_gateway.rest.routing import route


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    return json_response(list_models(gateway_of(request).snapshot()))


async def model(request: Request) -> Response:
    """`GET /v1/models/{org}/{name}`."""
    return json_response(get_model(gateway_of(request).snapshot(), ModelRef.parse(_name(request))))


async def delete(request: Request) -> Response:
    """`DELETE /v1/models/{org}/{name}?node=…&revision=…`."""
    gateway, name = gateway_of(request), _name(request)
    ref = ModelRef.parse(name)
    # Here `org/name` means every revision, so an explicit revision must be kept even where it is the default.
    revision = ref.revision if "@" in name else None
    nodes = select_delete_nodes(gateway.snapshot(), ref.repo, revision, request.query_params.get("node"))
    outcomes = await cancel_on_disconnect(request.receive, _delete_everywhere(gateway, name, nodes)) if nodes else {}
    raise_first_error(outcomes)
    deleted = any(o.result.get("deleted", True) for o in outcomes.values())
    return json_response({"model": name, "deleted": deleted, "nodes": results_by_node(outcomes)})


async def _delete_everywhere(gateway: GatewayContext, name: str, nodes: list[str]) -> dict[str, Outcome]:
    command, deadline_s = Delete(model=name), gateway.settings.timeouts.outcome_s
    return await gateway.sender.send_to_all(
        "storage", {n: new_command_id() for n in nodes}, "delete", command, deadline_s
    )


def _name(request: Request) -> str:
    name = f"{request.path_params['org']}/{request.path_params['name']}"
    revision = request.query_params.get("revision")
    if revision and "@" in name:
        raise BadInput("the revision is given twice, after @ and as ?revision=: give it once")
    return f"{name}@{revision}" if revision else name


ROUTES = [
    route("/v1/models", GET=models),
    route("/v1/models/{org}/{name}", GET=model, DELETE=delete),
]
