"""Refuse requests that `access_error` denies, before their body is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal_gateway.access import refusal
from shoal_gateway.errors_http import respond_to


class Guard:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, secret: str, credential_needed: bool) -> None:
        self._app, self._secret, self._credential_needed = app, secret, credential_needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the error."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refused = refusal(scope["method"], scope["path"], headers, self._secret, self._credential_needed)
            if refused is not None:
                await respond_to(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)
