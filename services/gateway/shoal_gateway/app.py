"""Wire routes, error handlers and the access middleware into one ASGI application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware

from shoal_common.identity.api_key import ApiKeyFile
from shoal_gateway.access import login
from shoal_gateway.access.middleware import AccessMiddleware
from shoal_gateway.context import GatewayContext
from shoal_gateway.events import endpoint
from shoal_gateway.generation.endpoint import chat_completions
from shoal_gateway.http_errors import HANDLERS
from shoal_gateway.rest import downloads, instances, models, nodes, placements, status, storage
from shoal_gateway.rest.routing import route

ROUTES = [
    *status.ROUTES,
    *login.ROUTES,
    *models.ROUTES,
    *downloads.ROUTES,
    *instances.ROUTES,
    *storage.ROUTES,
    *nodes.ROUTES,
    *placements.ROUTES,
    *endpoint.ROUTES,
    route("/v1/chat/completions", POST=chat_completions),
]


def build_app(gateway: GatewayContext, key_file: ApiKeyFile) -> Starlette:
    """Return the ASGI application of a gateway."""
    access = Middleware(AccessMiddleware, key_file=key_file)
    app = Starlette(routes=ROUTES, middleware=[access], exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.gateway, app.state.login = gateway, login.Login(key_file)
    return app
