"""Around all routes: refuses who may not enter, with a page for browsers and an error for programs."""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal_common.errors import Denied, ShoalError
from shoal_common.http.bounded_protocol import OWN_REQUEST
from shoal_common.identity.api_key import ApiKeyFile
from shoal_gateway.access import login_cookie
from shoal_gateway.access.login import login_page, port_of
from shoal_gateway.access.rules import Caller, access, own_path, wants_page
from shoal_gateway.context import HAS_LOGIN
from shoal_gateway.http_errors import respond_to


class AccessMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, key_file: ApiKeyFile) -> None:
        self._app, self._key_file = app, key_file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "http":
            headers, key = Headers(scope=scope), self._key_file
            cookie = login_cookie.value_in(headers.get("cookie") or "", login_cookie.cookie_name(port_of(scope)))
            caller = Caller(
                is_own=scope["state"].get(OWN_REQUEST, False),
                has_login=login_cookie.is_valid(cookie, key.key, time.time()),
            )
            found = access(scope["method"], scope["path"], headers, caller, key.is_key)
            if isinstance(found, ShoalError):
                if isinstance(found, Denied) and found.http_status == 401 and wants_page(scope["method"], headers):
                    query = b"?" + scope["query_string"] if scope["query_string"] else b""
                    target = own_path((scope["raw_path"] + query).decode("latin-1"))
                    await login_page(401, target)(scope, receive, send)
                else:
                    await respond_to(found)(scope, receive, send)
                return
            scope["state"][HAS_LOGIN] = found == "login"
        await self._app(scope, receive, send)
