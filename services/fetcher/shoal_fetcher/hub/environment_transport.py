"""The way to the hub that the environment names: proxies, certificates. Read when the hub is first asked.

A node whose environment names a file that is gone still serves and places models; only what asks the hub fails.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Collection, Mapping

import httpx2

from shoal_common.errors import Refused

RESTART_HINT = "correct it, then start the node again with `shoal down` and `shoal up`"
_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
_MAX_PORT = 65535
_CREDENTIALS = re.compile(r"(?<=//).*@|^[^/]*@")
_MAX_SHOWN_CHARS = 200
_CERTIFICATES: dict[str, Callable[[str], object]] = {
    "SSL_CERT_FILE": lambda path: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path),
    "SSL_CERT_DIR": lambda path: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(capath=path),
    "SSLKEYLOGFILE": lambda path: setattr(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "keylog_filename", path),
}


class EnvironmentTransport(httpx2.AsyncBaseTransport):
    """Sends requests as the environment says. Raises Refused, naming the variable, if that is not possible."""

    def __init__(self, environ: Mapping[str, str], make_client: Callable[[], httpx2.AsyncClient]) -> None:
        self._environ, self._make_client = environ, make_client
        self._opening = asyncio.Lock()
        self._client: httpx2.AsyncClient | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; redirects are the caller's."""
        async with self._opening:
            if self._client is None:
                self._client = await asyncio.to_thread(self._open)  # reads certificates
        return await self._client.send(request, stream=True, follow_redirects=False)

    def _open(self) -> httpx2.AsyncClient:
        reason = invalid_proxy(self._environ)
        try:
            if not reason:
                return self._make_client()
        except Exception as e:  # noqa: BLE001  # of ssl or of httpx2, which read the environment
            reason = invalid_certificates(self._environ, e)
        raise Refused(f"the hub cannot be asked: {reason}; {RESTART_HINT}")

    async def aclose(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()


def is_server_url(url: str, schemes: Collection[str]) -> bool:
    """Return whether a URL names a host, and a port that exists, with one of these schemes."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        return False
    host_is_valid = bool(parsed.host) and "%" not in parsed.host
    return parsed.scheme in schemes and host_is_valid and 0 < (parsed.port or 1) <= _MAX_PORT


def without_credentials(url: str) -> str:
    """Return a URL as messages show it, which may be none."""
    return _CREDENTIALS.sub("", url)[:_MAX_SHOWN_CHARS]


def invalid_proxy(environ: Mapping[str, str]) -> str:
    """Return which proxy cannot be used; "" if none. The password of a proxy is left out."""
    for name in (spelling for proxy in _PROXIES for spelling in (proxy, proxy.lower())):
        url = environ.get(name, "")
        if url and not is_server_url(url if "://" in url else f"http://{url}", _PROXY_SCHEMES):
            return f"{name}={without_credentials(url)} is not the address of a proxy ({', '.join(_PROXY_SCHEMES)})"
    return ""


def invalid_certificates(environ: Mapping[str, str], error: Exception) -> str:
    """Return which variable keeps a client from being made, which raised this error."""
    for name, load in _CERTIFICATES.items():
        if value := environ.get(name, ""):
            try:
                load(value)
            except (OSError, ValueError) as e:
                return f"{name}={value} cannot be used ({e})"
    return f"the proxy settings of this machine cannot be used ({error})"
