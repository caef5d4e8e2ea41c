"""Endpoints of placement previews: what placement would choose, and the alternatives. They change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from shoal_common.errors import BadInput
from shoal_common.messages import WireStruct
from shoal_common.messages.placement import (
    FittingModels,
    ListFits,
    ListRebalances,
    PlaceCommand,
    Previews,
    Rebalances,
)
from shoal_common.names import ModelRef, check_node
from shoal_gateway.context import gateway_of
from shoal_gateway.rest.command_results import require_placement
from shoal_gateway.rest.http_json import cancel_on_disconnect, json_response
from shoal_gateway.rest.routing import route

T = TypeVar("T")

_NODE_LISTS = ("nodes", "excluded_nodes")
_FIELDS = (
    "model",
    "context_tokens",
    "min_nodes",
    "max_nodes",
    "objective",
    "in_flight",
    "max_parallel_answers",
    "max_fetch_bytes",
    "layout",
)
_ANSWER_TIMEOUT_S = 30.0


async def preview(request: Request) -> Response:
    """`GET /v1/placements/preview?model=…`: possible layouts, first the one that `place` would choose."""
    return await _ask_placement(request, "previews", _question(request), Previews)


async def fits(request: Request) -> Response:
    """`GET /v1/placements/fits?context_tokens=…`: the downloaded models that could be placed now."""
    _refuse_others(request, ("context_tokens",))
    return await _ask_placement(request, "fits", _converted(dict(request.query_params), ListFits), FittingModels)


async def rebalances(request: Request) -> Response:
    """`GET /v1/placements/rebalances`: instances with a better layout elsewhere, and the gain."""
    _refuse_others(request, ())
    return await _ask_placement(request, "rebalances", ListRebalances(), Rebalances)


async def _ask_placement(request: Request, verb: str, question: WireStruct, answer: type[WireStruct]) -> Response:
    """Ask placement, on this node where it runs and on another node otherwise."""
    gateway = gateway_of(request)
    gateway.sender.require_nats()
    require_placement(gateway)
    nodes = gateway.snapshot().live_nodes("placement")
    node = gateway.node if gateway.node in nodes else nodes[0]
    call = gateway.context.rpc("placement", node, verb, question, answer, deadline_s=_ANSWER_TIMEOUT_S)
    return json_response(await cancel_on_disconnect(request.receive, call))


def _question(request: Request) -> PlaceCommand:
    given: dict[str, Any] = dict(request.query_params)
    _refuse_others(request, (*_FIELDS, *_NODE_LISTS))
    if not given.get("model"):
        raise BadInput("the parameter model is missing: /v1/placements/preview?model=org/name", param="model")
    for name in _NODE_LISTS:
        if name in given:
            given[name] = [check_node(node) for node in given[name].split(",") if node]
    given["model"] = str(ModelRef.parse(given["model"]))
    return _converted(given, PlaceCommand)


def _refuse_others(request: Request, known: Sequence[str]) -> None:
    for name in sorted(request.query_params.keys() - set(known)):
        raise BadInput(f"unknown parameter {name[:40]!r}; known: {', '.join(known) or 'none'}", param=name[:40])


def _converted(given: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as e:
        raise BadInput(f"a parameter has a wrong value: {e}") from None


ROUTES = [
    route("/v1/placements/preview", GET=preview),
    route("/v1/placements/fits", GET=fits),
    route("/v1/placements/rebalances", GET=rebalances),
]
