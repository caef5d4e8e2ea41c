"""Errors as HTTP responses: OpenAI's shape, Shoal's codes.

{"error": {"message": …, "type": …, "code": …, "param": null, "details": {…}}}
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from nats.errors import Error as NatsError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from shoal_common.errors import InternalError, ShoalError, Unavailable
from shoal_gateway.rest.http_json import json_response

_RETRY_AFTER_S = {429: 2, 503: 5}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(message: str, status: int, code: str, details: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the body of an error. `details["param"]`, where given, names the wrong field, as OpenAI does."""
    details = details or {}
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "code": code,
            "param": details.get("param"),
            "details": details,
        }
    }


def shoal_error_body(error: ShoalError) -> dict[str, Any]:
    """Return the body of a Shoal error."""
    return error_body(error.message, error.http_status, error.code, error.details)


def as_shoal_error(error: Exception) -> ShoalError:
    """Return any exception as a Shoal error. NATS errors become Unavailable; others only name their type."""
    if isinstance(error, ShoalError):
        return error
    if isinstance(error, NatsError):
        return Unavailable(f"NATS does not answer ({type(error).__name__}); try again, or run `shoal doctor`")
    return InternalError(f"{type(error).__name__} in the gateway; see `shoal logs gateway`")


def respond_to(error: ShoalError) -> Response:
    """Return the HTTP response for an error."""
    headers = {}
    if error.http_status in _RETRY_AFTER_S:
        seconds = error.details.get("retry_after_s", _RETRY_AFTER_S[error.http_status])
        headers["Retry-After"] = str(max(1, round(float(seconds))))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="shoal"'
    return json_response(shoal_error_body(error), error.http_status, headers)


async def on_error(_request: Request, error: Exception) -> Response:
    """Handle what an endpoint raises."""
    return respond_to(as_shoal_error(error))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handle what Starlette itself raises: no such route, no such method."""
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.url.path
    if status == 404:
        message, code = f"there is no route {path[:200]}; docs/protocol.md lists them", "not_found"
    elif status == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message, code = f"{path[:200]} does not take {request.method}; it takes {allowed}", "method_not_allowed"
    else:
        message, code = error.detail, HTTPStatus(status).phrase.lower().replace(" ", "_")
    return json_response(error_body(message, status, code), status, dict(error.headers or {}))


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """Handle a client that disconnected: nobody reads the response. 499 is the status that proxies use."""
    return Response(status_code=499)


HANDLERS = {
    ShoalError: on_error,
    NatsError: on_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_disconnect,
    Exception: on_error,
}
