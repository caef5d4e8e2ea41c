"""Endpoints of the status page, status, health and command outcomes."""

from __future__ import annotations

import time
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from shoal_common import VERSION
from shoal_common.errors import NotFound
from shoal_gateway.cluster.status_view import LocalNetwork, status_view
from shoal_gateway.context import gateway_of, has_login
from shoal_gateway.rest.http_json import json_response
from shoal_gateway.rest.routing import route

# The page contains its styles and script; it may load nothing else and may not be framed.
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_PAGE = resources.files("shoal_gateway").joinpath("static/index.html").read_bytes()
_PAGE_OF_A_LOGIN = _PAGE.replace(b'<button id="logout" hidden>', b'<button id="logout">')


async def page(request: Request) -> Response:
    """`GET /`: the status page."""
    return Response(_PAGE_OF_A_LOGIN if has_login(request) else _PAGE, 200, _PAGE_HEADERS, "text/html")


async def health(request: Request) -> Response:
    """`GET /health`: 200 while NATS is connected."""
    gateway = gateway_of(request)
    if not gateway.context.nats.connected:
        gateway.sender.require_nats()
    return json_response({"status": "ok", "node": gateway.node, "version": VERSION})


async def status(request: Request) -> Response:
    """`GET /v1/status`: nodes, models, downloads and instances."""
    gateway = gateway_of(request)
    connected, place = (
        gateway.context.nats.connected,
        LocalNetwork(gateway.network, gateway.context.interfaces.current),
    )
    return json_response(status_view(gateway.snapshot(), gateway.node, VERSION, connected, time.time(), place))


async def command(request: Request) -> Response:
    """`GET /v1/commands/{id}`: the outcome of a command."""
    gateway, identity = gateway_of(request), request.path_params["id"]
    gateway.sender.require_nats()
    outcome = await gateway.sender.outcome(identity)
    if outcome is None:
        raise NotFound(f"command {identity} has no outcome: it has not ended yet, or ended more than an hour ago")
    return json_response(outcome)


ROUTES = [
    route("/", GET=page),
    route("/health", GET=health),
    route("/v1/status", GET=status),
    route("/v1/commands/{id}", GET=command),
]
