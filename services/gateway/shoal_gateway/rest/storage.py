"""Endpoints of storage: usage, settings, eviction dry run, pins, garbage collection, verification."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from shoal_common.errors import BadInput
from shoal_common.messages.envelope import Command
from shoal_common.messages.storage import CollectGarbage, Configure, EvictionPlan, Pin, PlanEviction, Reload, Verify
from shoal_common.names import ModelRef
from shoal_common.rpc.command_client import new_command_id
from shoal_common.settings.node import StorageSettings
from shoal_common.settings.values import checked_changes
from shoal_gateway.cluster.status_view import storage_views
from shoal_gateway.context import GatewayContext, gateway_of
from shoal_gateway.rest.command_results import raise_first_error, results_by_node
from shoal_gateway.rest.http_json import cancel_on_disconnect, json_response, read_body_as
from shoal_gateway.rest.node_selection import NodeSelection, select_storage_nodes
from shoal_gateway.rest.routing import route

_MAX_BYTES = (1 << 63) - 1


class ConfigureBody(Configure):
    """The body of `PUT /v1/storage/config`: the `configure` command and its nodes."""

    node: str | None = None
    nodes: NodeSelection = None


class ReloadBody(Reload):
    """The body of `POST /v1/storage/reload`: the `reload` command and its nodes."""

    node: str | None = None
    nodes: NodeSelection = None


class PinBody(Pin):
    """The body of `POST /v1/storage/pins`: the `pin` command and its nodes."""

    node: str | None = None
    nodes: NodeSelection = None


class CollectGarbageBody(CollectGarbage):
    """The body of `POST /v1/storage/gc`: the `gc` command and its nodes."""

    node: str | None = None
    nodes: NodeSelection = None


class VerifyBody(Verify):
    """The body of `POST /v1/storage/verify`: the `verify` command and its nodes."""

    node: str | None = None
    nodes: NodeSelection = None


async def storages(request: Request) -> Response:
    """`GET /v1/storage`."""
    gateway = gateway_of(request)
    return json_response({"node": gateway.node, "nodes": storage_views(gateway.snapshot())})


async def configure(request: Request) -> Response:
    """`PUT /v1/storage/config`."""
    body = await read_body_as(request, ConfigureBody)
    command = Configure(**checked_changes(StorageSettings, body), deadline_s=body.deadline_s)
    return await _on_nodes(request, "configure", command, body.node, body.nodes)


async def reload(request: Request) -> Response:
    """`POST /v1/storage/reload`."""
    body = await read_body_as(request, ReloadBody)
    return await _on_nodes(request, "reload", Reload(deadline_s=body.deadline_s), body.node, body.nodes)


async def pin(request: Request) -> Response:
    """`POST /v1/storage/pins`."""
    body = await read_body_as(request, PinBody)
    ModelRef.parse(body.model)
    command = Pin(model=body.model, pinned=body.pinned, deadline_s=body.deadline_s)
    return await _on_nodes(request, "pin", command, body.node, body.nodes)


async def collect_garbage(request: Request) -> Response:
    """`POST /v1/storage/gc`."""
    body = await read_body_as(request, CollectGarbageBody)
    return await _on_nodes(request, "gc", CollectGarbage(deadline_s=body.deadline_s), body.node, body.nodes)


async def verify(request: Request) -> Response:
    """`POST /v1/storage/verify`: answers when everything has been hashed."""
    body = await read_body_as(request, VerifyBody)
    if body.model:
        ModelRef.parse(body.model)
    command = Verify(model=body.model, deadline_s=body.deadline_s)
    limit_s = gateway_of(request).settings.timeouts.verify_s
    return await _on_nodes(request, "verify", command, body.node, body.nodes, limit_s)


async def plan(request: Request) -> Response:
    """`GET /v1/storage/plan?need_bytes=…&node=…`: a dry run of eviction."""
    gateway, text = gateway_of(request), request.query_params.get("need_bytes", "")
    if not (text.isascii() and text.isdigit()) or int(text[:20]) > _MAX_BYTES:
        raise BadInput(f"need_bytes is {text[:40]!r}; give a whole number of bytes", param="need_bytes")
    gateway.sender.require_nats()
    nodes = select_storage_nodes(gateway.snapshot(), request.query_params.get("node"), None, gateway.node)
    plans = await cancel_on_disconnect(request.receive, _plans(gateway, nodes, PlanEviction(need_bytes=int(text))))
    return json_response({"nodes": plans})


async def _plans(gateway: GatewayContext, nodes: list[str], request: PlanEviction) -> Mapping[str, EvictionPlan]:
    ask = gateway.context.rpc
    answers = await asyncio.gather(*(ask("storage", n, "plan", request, EvictionPlan) for n in nodes))
    return dict(zip(nodes, answers, strict=True))


async def _on_nodes(
    request: Request, verb: str, command: Command, node: str | None, nodes: NodeSelection, limit_s: float = 0.0
) -> Response:
    """Send a command to the chosen nodes' storage and return each one's result."""
    gateway = gateway_of(request)
    gateway.sender.require_nats()
    chosen = select_storage_nodes(gateway.snapshot(), node, nodes, gateway.node)
    deadline_s = command.deadline_s or limit_s or gateway.settings.timeouts.outcome_s
    sending = gateway.sender.send_to_all("storage", {n: new_command_id() for n in chosen}, verb, command, deadline_s)
    outcomes = await cancel_on_disconnect(request.receive, sending)
    raise_first_error(outcomes)
    return json_response({"nodes": results_by_node(outcomes)})


ROUTES = [
    route("/v1/storage", GET=storages),
    route("/v1/storage/config", PUT=configure),
    # The path of other systems, so that scripts written for them work.
    route("/storage/config", PUT=configure),
    route("/v1/storage/reload", POST=reload),
    route("/v1/storage/plan", GET=plan),
    route("/v1/storage/pins", POST=pin),
    route("/v1/storage/gc", POST=collect_garbage),
    route("/v1/storage/verify", POST=verify),
]
