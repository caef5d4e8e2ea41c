"""Who may call the gateway: the decision, and the middleware that applies it."""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal_common.errors import Denied, ShoalError
from shoal_common.host.credentials import derive
from shoal_common.http.errors import CrossOriginForbidden
from shoal_gateway.http_errors import respond_to

PUBLIC_PATHS = frozenset({"/health"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES = frozenset({"", "same-origin", "none"})


def access_error(
    method: str, path: str, headers: Mapping[str, str], secret: str, credential_needed: bool
) -> ShoalError | None:
    """Return why a request is refused, or None. `headers` must look names up case-insensitively."""
    if method not in _READING:
        origin = headers.get("origin")
        if origin is not None and not _same_place(origin, headers.get("host") or ""):
            return CrossOriginForbidden(
                f"a web page from {origin[:100]!r} may not control this node; open the node's own page instead"
            )
        if (headers.get("sec-fetch-site") or "") not in _OWN_SITES:
            return CrossOriginForbidden(
                "a web page from another site may not control this node; open the node's own page instead"
            )
    if path in PUBLIC_PATHS or not credential_needed or _shows_secret(headers.get("authorization") or "", secret):
        return None
    return Denied(
        "a token is needed: send `Authorization: Bearer …` with the cluster's secret (the file `secret` in "
        "a node's home); in a browser, enter it as the password"
    )


def _shows_secret(authorization: str, secret: str) -> bool:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except ValueError:
            return False
    elif scheme.lower() != "bearer":
        return False
    # Always compare both, so that the timing reveals nothing about either.
    is_secret = hmac.compare_digest(given.strip().encode(), secret.encode())
    is_key = hmac.compare_digest(given.strip().encode(), derive(secret, "api").encode())
    return bool(secret) and (is_secret or is_key)


def _same_place(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


class AuthMiddleware:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, secret: str, credential_needed: bool) -> None:
        self._app, self._secret, self._credential_needed = app, secret, credential_needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with the error."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refused = access_error(scope["method"], scope["path"], headers, self._secret, self._credential_needed)
            if refused is not None:
                await respond_to(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)
