"""Wire routes, error handlers and the auth middleware into one ASGI application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware

from shoal_gateway.auth import AuthMiddleware
from shoal_gateway.context import GatewayContext
from shoal_gateway.events import endpoint
from shoal_gateway.generation.endpoint import chat_completions
from shoal_gateway.http_errors import HANDLERS
from shoal_gateway.rest import downloads, instances, models, nodes, placements, status, storage
from shoal_gateway.rest.routing import route

ROUTES = [
    *status.ROUTES,
    *models.ROUTES,
    *downloads.ROUTES,
    *instances.ROUTES,
    *storage.ROUTES,
    *nodes.ROUTES,
    *placements.ROUTES,
    *endpoint.ROUTES,
    route("/v1/chat/completions", POST=chat_completions),
]


def build_app(gateway: GatewayContext) -> Starlette:
    """Return the ASGI application of a gateway."""
    auth = Middleware(
        AuthMiddleware, secret=gateway.context.config.secret, credential_needed=gateway.settings.credential_needed
    )
    app = Starlette(routes=ROUTES, middleware=[auth], exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app
