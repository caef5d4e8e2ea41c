"""Login in a browser: a page with one field, and the cookie that it leads to."""

from __future__ import annotations

import base64
import hashlib
import html
import time
from importlib import resources
from string import Template
from typing import cast
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from shoal_common.http.errors import TooLarge
from shoal_common.identity.api_key import ApiKeyFile
from shoal_common.logs import StructuredLogger
from shoal_gateway.access import login_cookie
from shoal_gateway.access.login_attempts import LoginAttempts
from shoal_gateway.access.rules import LOGIN_PATH, LOGOUT_PATH, own_path
from shoal_gateway.rest.routing import route

log = StructuredLogger("login")

_MAX_FORM_BYTES = 8 << 10
_PAGE = Template(resources.files("shoal_gateway").joinpath("static/login.html").read_text())
_STYLE = _PAGE.template.partition("<style>")[2].partition("</style>")[0]
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers send the form with `Origin: null`
}


def login_page(status: int, target: str, message: str = "") -> Response:
    """Return the page; a login leads to `target`, a path of this server."""
    text = _PAGE.substitute(target=html.escape(target), message=html.escape(message))
    headers = dict(_HEADERS)
    if status == 401:
        # Not Basic: a browser would ask by itself, and remember what it was told for as long as it runs.
        headers["WWW-Authenticate"] = 'Bearer realm="shoal"'
    return Response(text, status, headers, "text/html")


def port_of(scope: Scope) -> int:
    """Return the port on which a request came."""
    server = scope.get("server")
    return int(server[1] or 0) if server else 0


class Login:
    """Checks the keys that are typed."""

    def __init__(self, key_file: ApiKeyFile) -> None:
        self._key_file, self._attempts = key_file, LoginAttempts()

    def try_key(self, key: str, address: str, target: str) -> str | Response:
        """Return a cookie's value, or the page that says why not."""
        now_s = time.monotonic()
        if wait_s := self._attempts.wait_s(address, now_s):
            page = login_page(429, target, f"Too many wrong keys from this address. Try again in {round(wait_s)} s.")
            page.headers["Retry-After"] = str(max(round(wait_s), 1))
            return page
        if self._key_file.is_key(key):
            return login_cookie.new_value(self._key_file.key, time.time())
        if self._attempts.record_failure(address, now_s):
            log.warning("too many logins with a wrong key", address=address)
        return login_page(401, target, "This is not the key of this node.")


async def show_login(request: Request) -> Response:
    """`GET /login`: the page."""
    return login_page(200, own_path(request.query_params.get("next", "/")))


async def log_in(request: Request) -> Response:
    """`POST /login`: check the key that was typed; on success set the cookie and go to the page asked for."""
    login, form = cast(Login, request.app.state.login), dict(parse_qsl(await _read_form(request)))
    target = own_path(form.get("next", "/"))
    result = login.try_key(form.get("key", "").strip(), request.client.host if request.client else "", target)
    return result if isinstance(result, Response) else _go_to(request, target, result)


async def _read_form(request: Request) -> str:
    """Return a short body. Raises TooLarge as soon as it is longer: strangers send it, and hold no memory with it."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_FORM_BYTES:
            raise TooLarge("this is no login: the form is too long", limit_bytes=_MAX_FORM_BYTES)
    return body.decode("latin-1")


async def log_out(request: Request) -> Response:
    """`POST /logout`: take the cookie back."""
    return _go_to(request, LOGIN_PATH, "")


def _go_to(request: Request, target: str, cookie: str) -> Response:
    name = login_cookie.cookie_name(port_of(request.scope))
    headers = {
        "Location": target,
        "Cache-Control": "no-store",
        "Set-Cookie": login_cookie.set_cookie(name, cookie, request.scope["scheme"] == "https"),
    }
    return Response(status_code=303, headers=headers)


ROUTES = [route(LOGIN_PATH, GET=show_login, POST=log_in), route(LOGOUT_PATH, POST=log_out)]
