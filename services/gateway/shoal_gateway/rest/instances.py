"""Endpoints of instances: list, place, stop and rebalance."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from shoal_common.bus.keys import instance_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.bus.subjects import ANY
from shoal_common.errors import Expired, InternalError, NotFound, from_body
from shoal_common.messages import WireStruct
from shoal_common.messages.instances import InstanceState
from shoal_common.messages.placement import PlaceCommand, Rebalance, Unplace
from shoal_common.messages.views import InstanceView
from shoal_common.names import ModelRef, check_id, check_node
from shoal_common.rpc.command_client import new_command_id
from shoal_gateway.cluster.status_view import instance_view, instance_views
from shoal_gateway.context import GatewayContext, gateway_of
from shoal_gateway.rest.command_results import error_of, require_placement, send_to_leader, with_details
from shoal_gateway.rest.http_json import cancel_on_disconnect, json_response, read_body_as
from shoal_gateway.rest.routing import route

_PLACE_TIMEOUT_S = 120.0
"""For the leader's decision, a change of leader included."""
_VISIBLE_TIMEOUT_S = 10.0
"""For what the leader has written to reach this gateway's mirrors."""


class PlaceBody(PlaceCommand):
    """The body of `POST /v1/instances`: the `place` command, and whether to wait until the instance is ready."""

    wait: bool = True


class RebalanceBody(WireStruct):
    """The body of `POST /v1/instances/{id}/rebalance`."""

    layout: str = ""


async def instances(request: Request) -> Response:
    """`GET /v1/instances`."""
    return json_response({"instances": instance_views(gateway_of(request).snapshot())})


async def instance(request: Request) -> Response:
    """`GET /v1/instances/{id}`."""
    identity = check_id(request.path_params["id"])
    view = instance_view(gateway_of(request).snapshot(), identity)
    if view is None:
        raise NotFound(f"there is no instance {identity}; `shoal ps` lists them")
    return json_response(view)


async def place(request: Request) -> Response:
    """`POST /v1/instances`: 201 with the instance, which is ready unless `wait` is false."""
    gateway, body = gateway_of(request), await read_body_as(request, PlaceBody)
    given = {name: getattr(body, name) for name in PlaceCommand.__struct_fields__ if name != "id"}
    command = PlaceCommand(
        **{**given, "model": str(ModelRef.parse(body.model)), "nodes": [check_node(n) for n in body.nodes]}
    )
    require_placement(gateway)
    view, identity = await cancel_on_disconnect(request.receive, _place(gateway, command, body.wait))
    return json_response({**_fields(view), "command": identity}, 201, {"Location": f"/v1/instances/{view.id}"})


async def unplace(request: Request) -> Response:
    """`DELETE /v1/instances/{id}`. Sends nothing when the instance does not exist."""
    gateway, identity = gateway_of(request), check_id(request.path_params["id"])
    gateway.sender.require_nats()
    if instance_view(gateway.snapshot(), identity) is None:
        return json_response({"id": identity, "deleted": False})
    _, command_id = await send_to_leader(request, "unplace", Unplace(instance=identity))
    return json_response({"id": identity, "deleted": True, "command": command_id})


async def rebalance(request: Request) -> Response:
    """`POST /v1/instances/{id}/rebalance`: move it, to `layout` if one is named. Answers before the move ends."""
    gateway, body = gateway_of(request), await read_body_as(request, RebalanceBody)
    identity = check_id(request.path_params["id"])
    gateway.sender.require_nats()
    outcome, command = await send_to_leader(request, "rebalance", Rebalance(instance=identity, layout=body.layout))
    epoch = int(str(outcome.result.get("epoch") or 0))

    def moved(_: KvMirror) -> InstanceView | None:
        view = instance_view(gateway.snapshot(), identity)
        return view if view is not None and view.epoch >= epoch else None

    view = await gateway.spec.wait_for(moved, _VISIBLE_TIMEOUT_S)
    if view is None:
        raise NotFound(f"instance {identity} was stopped meanwhile; see `shoal ps`", instance=identity)
    return json_response({**_fields(view), "moved": bool(outcome.result.get("moved")), "command": command})


async def _place(gateway: GatewayContext, command: PlaceCommand, wait: bool) -> tuple[InstanceView, str]:
    identity = new_command_id()
    outcome = await gateway.sender.send(
        "placement", ANY, "place", command, identity, command.deadline_s or _PLACE_TIMEOUT_S
    )
    error = error_of(outcome)
    if error is not None:
        raise error
    placed = str(outcome.result.get("instance") or outcome.result.get("id") or "")
    if not placed:
        raise InternalError("placement returned no instance id; see `shoal ps`", command=identity)
    if wait:
        await _until_ready(gateway, placed)
    view = await gateway.spec.wait_for(lambda _: instance_view(gateway.snapshot(), placed), _VISIBLE_TIMEOUT_S)
    if view is None:
        raise NotFound(f"instance {placed} was created and stopped again; see `shoal ps`", instance=placed)
    return view, identity


async def _until_ready(gateway: GatewayContext, placed: str) -> None:
    def ready_or_failed(state: KvMirror) -> InstanceState | None:
        now = state.get(instance_key(placed), InstanceState)
        if now is None:
            return None
        lacks_node = now.error is not None and "down_since_s" in now.error.details
        return now if now.phase in ("ready", "failed") or lacks_node else None

    deadline_s = gateway.settings.timeouts.place_s
    state = await gateway.state.wait_for(ready_or_failed, deadline_s)
    if state is None:
        now = instance_view(gateway.snapshot(), placed)
        phase = now.phase if now else "stopped"
        raise Expired(
            f"instance {placed} is {phase} after {deadline_s:.0f} s and still starting: see `shoal ps`, "
            f"or stop it with `shoal stop {placed}`",
            instance=placed,
        )
    if state.phase != "ready":
        error = (
            from_body(state.error) if state.error else InternalError(f"instance {placed} failed; see `shoal logs`")
        )
        raise with_details(error, instance=placed)


def _fields(view: InstanceView) -> dict[str, object]:
    return {name: getattr(view, name) for name in view.__struct_fields__}


ROUTES = [
    route("/v1/instances", GET=instances, POST=place),
    route("/v1/instances/{id}", GET=instance, DELETE=unplace),
    route("/v1/instances/{id}/rebalance", POST=rebalance),
]
