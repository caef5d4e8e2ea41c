"""Who may use the gateway (I12), as a pure decision over a request's headers.

Beyond loopback every request shows the cluster's secret, or the key derived from it for `api`, as a bearer token;
browsers, which cannot send one, as the password of HTTP Basic with any user name. Everywhere a browser may act
only for pages of the gateway itself: the pages of others could otherwise drive a node on somebody's loopback.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from shoal_common.config import is_loopback
from shoal_common.credentials import derive
from shoal_common.errors import BadInput, Denied, ShoalError
from shoal_gateway.errors import ForeignPage

OPEN_PATHS = frozenset({"/health"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES = frozenset({"", "same-origin", "none"})


def refusal(
    method: str, path: str, headers: Mapping[str, str], secret: str, credential_needed: bool
) -> ShoalError | None:
    """Why a request is turned away, or None. `headers` must look names up in any case."""
    host = headers.get("host") or ""
    if not credential_needed and not _is_loopback_name(_hostname(host)):
        # A page can give its own name the address 127.0.0.1 and is then same-origin with what listens here.
        return ForeignPage(f"this gateway is for 127.0.0.1 and localhost, not for the host {host[:100]!r}")
    if method not in _READING:
        origin = headers.get("origin")
        if origin is not None and not _same_place(origin, host):
            return ForeignPage(f"a page of {origin[:100]!r} may not use this gateway; open its own page instead")
        if (headers.get("sec-fetch-site") or "") not in _OWN_SITES:
            return ForeignPage("a page from elsewhere may not use this gateway; open its own page instead")
    if path in OPEN_PATHS or not credential_needed or _shows_secret(headers.get("authorization") or "", secret):
        return None
    return Denied(
        "a credential is needed: send `Authorization: Bearer …` with the cluster's secret (the file `secret` in "
        "a node's home); in a browser, give it as the password"
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
    # Both are always compared, so that the time says nothing about either.
    is_secret = hmac.compare_digest(given.strip().encode(), secret.encode())
    is_key = hmac.compare_digest(given.strip().encode(), derive(secret, "api").encode())
    return bool(secret) and (is_secret or is_key)


def _same_place(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback_name(hostname: str) -> bool:
    try:
        return is_loopback(hostname)
    except BadInput:
        return False
