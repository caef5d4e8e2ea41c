"""Who may call the gateway. Pure."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from shoal_common.errors import Denied, ShoalError
from shoal_common.http.errors import CrossOriginForbidden

Access = Literal["public", "key", "login", "own"]
"""What let a request in; `own`: this user's process sent it, from this machine."""

LOGIN_PATH, LOGOUT_PATH = "/login", "/logout"
PUBLIC_PATHS = frozenset({"/health", LOGIN_PATH, LOGOUT_PATH})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITES = frozenset({"", "same-origin", "none"})


class Caller(msgspec.Struct, frozen=True):
    """What is known of who sends a request."""

    is_own: bool
    """Whether a process of this user sent it, from this machine and for nobody else."""
    has_login: bool
    """Whether it has the cookie of a login that is valid now."""


def access(
    method: str, path: str, headers: Mapping[str, str], caller: Caller, is_key: Callable[[str], bool]
) -> Access | ShoalError:
    """Return what lets a request in, or why it is refused. `headers` must look names up case-insensitively."""
    origin = headers.get("origin")
    if method not in _READING:
        if origin is not None and not _same_place(origin, headers.get("host") or ""):
            return CrossOriginForbidden(
                f"a web page from {origin[:100]!r} may not control this node; open the node's own page instead"
            )
        if (headers.get("sec-fetch-site") or "") not in _OWN_SITES:
            return CrossOriginForbidden(
                "a web page from another site may not control this node; open the node's own page instead"
            )
    if is_key(shown_key(headers.get("authorization") or "")):
        return "key"
    # Browsers send a cookie along whoever asks, and Origin with whatever changes something.
    if caller.has_login and (origin is not None or method in _READING):
        return "login"
    if caller.is_own:
        return "own"
    if path in PUBLIC_PATHS:
        return "public"
    return Denied(
        "a key is needed: send `Authorization: Bearer KEY` (the command line: SHOAL_API_KEY=KEY); on the node, "
        "`shoal key` prints it, and it is the file api.key in the node's home; in a browser, open /login"
    )


def shown_key(authorization: str) -> str:
    """Return the key in a header: Bearer, or the password of Basic with any user name; "" without one."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    elif scheme.lower() != "bearer":
        return ""
    return given.strip()


def wants_page(method: str, headers: Mapping[str, str]) -> bool:
    """Return whether a browser asks for a page, which it would show to a person."""
    return method in ("GET", "HEAD") and "text/html" in (headers.get("accept") or "").lower()


def own_path(text: str) -> str:
    """Return a path of this server, where a login leads; "/" for whatever could lead elsewhere."""
    plain = text.startswith("/") and not text.startswith(("//", "/\\")) and text.isascii() and text.isprintable()
    return text if plain and " " not in text else "/"


def _same_place(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
