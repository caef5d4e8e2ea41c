"""Wire routes, error handlers and the auth middleware into one ASGI application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware

from shoal_gateway import (
    api_downloads,
    api_events,
    api_instances,
    api_models,
    api_nodes,
    api_placements,
    api_status,
    api_storage,
)
from shoal_gateway.chat import chat_completions
from shoal_gateway.errors_http import HANDLERS
from shoal_gateway.gateway import Gateway
from shoal_gateway.guard import Guard
from shoal_gateway.resource import resource

ROUTES = [
    *api_status.ROUTES,
    *api_models.ROUTES,
    *api_downloads.ROUTES,
    *api_instances.ROUTES,
    *api_storage.ROUTES,
    *api_nodes.ROUTES,
    *api_placements.ROUTES,
    *api_events.ROUTES,
    resource("/v1/chat/completions", POST=chat_completions),
]


def build_app(gateway: Gateway) -> Starlette:
    """Return the ASGI application of a gateway."""
    guard = Middleware(
        Guard, secret=gateway.context.config.secret, credential_needed=gateway.settings.credential_needed
    )
    app = Starlette(routes=ROUTES, middleware=[guard], exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app
