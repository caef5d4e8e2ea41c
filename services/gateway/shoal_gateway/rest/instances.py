"""Endpoints of instances: list, place, stop and rebalance."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from shoal_common.bus.keys import instance_key
from shoal_common.bus.kv_mirror import View
from shoal_common.bus.subjects import ANY
from shoal_common.errors import Expired, Failed, NotFound, from_body
from shoal_common.messages import Message
from shoal_common.messages.instances import InstanceState
from shoal_common.messages.placement import Place, Rebalance, Unplace
from shoal_common.names import ModelRef, check_id, check_node
from shoal_common.rpc.command_client import new_id
from shoal_gateway.cluster.status_view import InstanceView, instance_view, instance_views
from shoal_gateway.context import Gateway, gateway_of
from shoal_gateway.rest.command_results import carried_out, error_of, require_placement, with_details
from shoal_gateway.rest.http_json import read_as, reply, unless_gone
from shoal_gateway.rest.routing import resource

_PLACE_TIMEOUT_S = 120.0
"""For the leader's decision, a change of leader included."""
_VISIBLE_TIMEOUT_S = 10.0
"""For what the leader has written to reach this gateway's mirrors."""


class AskPlace(Place):
    """The body of `POST /v1/instances`: the `place` command, and whether to wait until the instance is ready."""

    wait: bool = True


class AskRebalance(Message):
    """The body of `POST /v1/instances/{id}/rebalance`."""

    layout: str = ""


async def instances(request: Request) -> Response:
    """`GET /v1/instances`."""
    return reply({"instances": instance_views(gateway_of(request).picture())})


async def instance(request: Request) -> Response:
    """`GET /v1/instances/{id}`."""
    identity = check_id(request.path_params["id"])
    view = instance_view(gateway_of(request).picture(), identity)
    if view is None:
        raise NotFound(f"there is no instance {identity}; `shoal ps` lists them")
    return reply(view)


async def place(request: Request) -> Response:
    """`POST /v1/instances`: 201 with the instance, which is ready unless `wait` is false."""
    gateway, body = gateway_of(request), await read_as(request, AskPlace)
    given = {name: getattr(body, name) for name in Place.__struct_fields__ if name != "id"}
    command = Place(
        **{**given, "model": str(ModelRef.parse(body.model)), "nodes": [check_node(n) for n in body.nodes]}
    )
    require_placement(gateway)
    view, identity = await unless_gone(request.receive, _place(gateway, command, body.wait))
    return reply({**_fields(view), "command": identity}, 201, {"Location": f"/v1/instances/{view.id}"})


async def unplace(request: Request) -> Response:
    """`DELETE /v1/instances/{id}`. Sends nothing when the instance does not exist."""
    gateway, identity = gateway_of(request), check_id(request.path_params["id"])
    gateway.sender.require_nats()
    if instance_view(gateway.picture(), identity) is None:
        return reply({"id": identity, "deleted": False})
    _, command_id = await carried_out(request, "unplace", Unplace(instance=identity))
    return reply({"id": identity, "deleted": True, "command": command_id})


async def rebalance(request: Request) -> Response:
    """`POST /v1/instances/{id}/rebalance`: move it, to `layout` if one is named. Answers before the move ends."""
    gateway, body = gateway_of(request), await read_as(request, AskRebalance)
    identity = check_id(request.path_params["id"])
    gateway.sender.require_nats()
    outcome, command = await carried_out(request, "rebalance", Rebalance(instance=identity, layout=body.layout))
    epoch = int(str(outcome.result.get("epoch") or 0))

    def moved(_: View) -> InstanceView | None:
        view = instance_view(gateway.picture(), identity)
        return view if view is not None and view.epoch >= epoch else None

    view = await gateway.spec.until(moved, _VISIBLE_TIMEOUT_S)
    if view is None:
        raise NotFound(f"instance {identity} was stopped meanwhile; see `shoal ps`", instance=identity)
    return reply({**_fields(view), "moved": bool(outcome.result.get("moved")), "command": command})


async def _place(gateway: Gateway, command: Place, wait: bool) -> tuple[InstanceView, str]:
    identity = new_id()
    outcome = await gateway.sender.outcome_of(
        "placement", ANY, "place", command, identity, command.deadline_s or _PLACE_TIMEOUT_S
    )
    error = error_of(outcome)
    if error is not None:
        raise error
    placed = str(outcome.result.get("instance") or outcome.result.get("id") or "")
    if not placed:
        raise Failed("placement returned no instance id; see `shoal ps`", command=identity)
    if wait:
        await _until_ready(gateway, placed)
    view = await gateway.spec.until(lambda _: instance_view(gateway.picture(), placed), _VISIBLE_TIMEOUT_S)
    if view is None:
        raise NotFound(f"instance {placed} was created and stopped again; see `shoal ps`", instance=placed)
    return view, identity


async def _until_ready(gateway: Gateway, placed: str) -> None:
    def ready_or_failed(state: View) -> InstanceState | None:
        now = state.get(instance_key(placed), InstanceState)
        return now if now is not None and now.phase in ("ready", "failed") else None

    deadline_s = gateway.settings.limits.place_s
    state = await gateway.state.until(ready_or_failed, deadline_s)
    if state is None:
        now = instance_view(gateway.picture(), placed)
        phase = now.phase if now else "stopped"
        raise Expired(
            f"instance {placed} is {phase} after {deadline_s:.0f} s and still starting: see `shoal ps`, "
            f"or stop it with `shoal stop {placed}`",
            instance=placed,
        )
    if state.phase == "failed":
        error = from_body(state.error) if state.error else Failed(f"instance {placed} failed; see `shoal logs`")
        raise with_details(error, instance=placed)


def _fields(view: InstanceView) -> dict[str, object]:
    return {name: getattr(view, name) for name in view.__struct_fields__}


ROUTES = [
    resource("/v1/instances", GET=instances, POST=place),
    resource("/v1/instances/{id}", GET=instance, DELETE=unplace),
    resource("/v1/instances/{id}/rebalance", POST=rebalance),
]
