"""The cookie of a login: the end of its time, and a code of it under the node's key. Another key ends all. Pure."""

from __future__ import annotations

import hashlib
import hmac

LIFETIME_S = 30 * 86400
_MAX_DIGITS = 12


def cookie_name(port: int) -> str:
    """Return the cookie's name: browsers send cookies to all ports of a host, where another node may listen."""
    return f"shoal_login_{port}"


def new_value(key: str, now_s: float) -> str:
    """Return a cookie's value."""
    until_s = int(now_s) + LIFETIME_S
    return f"{until_s}.{_code(key, until_s)}"


def is_valid(value: str, key: str, now_s: float) -> bool:
    """Return whether a cookie's value was made with this key and is valid now."""
    until, _, code = value.partition(".")
    if not (key and until.isascii() and until.isdigit() and len(until) <= _MAX_DIGITS and now_s < int(until)):
        return False
    return hmac.compare_digest(code.encode(errors="replace"), _code(key, int(until)).encode())


def value_in(header: str, name: str) -> str:
    """Return a cookie's value in the header `Cookie`; "" without it."""
    for part in header.split(";"):
        given, _, value = part.strip().partition("=")
        if given == name:
            return value
    return ""


def set_cookie(name: str, value: str, is_tls: bool) -> str:
    """Return the header `Set-Cookie` of a login; with "" as the value, of a logout."""
    lifetime_s = LIFETIME_S if value else 0
    secure = "; Secure" if is_tls else ""
    return f"{name}={value}; Path=/; Max-Age={lifetime_s}; HttpOnly; SameSite=Strict{secure}"


def _code(key: str, until_s: int) -> str:
    return hmac.new(key.encode(), f"shoal/v1/login/{until_s}".encode(), hashlib.sha256).hexdigest()
