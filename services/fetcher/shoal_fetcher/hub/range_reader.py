"""Reads a byte range of a file from the hub, and maps HTTP errors to ours."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2
import msgspec

from shoal_common.errors import Corrupt, Denied, HubUnavailable, InternalError, NotFound, ShoalError, Unavailable
from shoal_common.messages.manifest import ManifestFile
from shoal_common.units import format_bytes
from shoal_fetcher.errors import PeerTimeout, RateLimited
from shoal_fetcher.hub.environment_transport import EnvironmentTransport

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0
"""A source that sends nothing for this long is left."""
HEAD_TIMEOUT_S = 60.0
"""From a request to the head of its answer, redirects included, however many bytes trickle in."""
MAX_REDIRECTS = 5
MAX_LINKS = 3
"""How often the hub is asked for a link in a row, when the content network refuses what the hub redirects to."""
CHUNK_BYTES = 256 << 10
_MAX_CONNECTIONS = 32
_DEFAULT_RETRY_S = 5.0
_MAX_RETRY_S = 900.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_RATE_LIMIT_RESET = re.compile(r"\bt=(\d+)")


_HUB_PATHS = ("/resolve", "/api/")
_NO_REFUSALS = (408, 416, 429)
_MAX_LENGTH_DIGITS = 20
_ON_THE_WAY = "a proxy or a login page may be on the way"
_TRUST_HINT = "SSL_CERT_FILE may name a file with the authority that signed it, such as that of your proxy"
_HUB_HINT = "check the connection, or HF_ENDPOINT"


TOKEN_HINT = "pull it with your token: `HF_TOKEN=hf_… shoal pull`, or `hf auth login` first"


class HttpSource(msgspec.Struct, frozen=True):
    """A server as messages name it, its error class when down, and a hint."""

    name: str
    unavailable_error: type[Unavailable]
    hint: str


def hub_source(endpoint: str) -> HttpSource:
    """Return the hub as a source. A password in its address is left out of messages."""
    return HttpSource(f"hub {endpoint.rpartition('//')[2].rpartition('@')[2]}", HubUnavailable, _HUB_HINT)


class Body(msgspec.Struct, frozen=True):
    """A body being read: the offset of its first byte, and its chunks."""

    offset: int
    chunks: AsyncIterator[bytes]


def make_hub_client(
    silence_timeout_s: float = SILENCE_TIMEOUT_S, environ: Mapping[str, str] = os.environ
) -> httpx2.AsyncClient:
    """Return a client for the hub that uses the environment's proxies, and keeps no cookies.

    The environment is read at the first request, which raises Refused if it names something unusable.
    """

    def make_client() -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            cookies=no_cookies,
            timeout=timeout,
            limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS),
            trust_env=True,
        )

    timeout = httpx2.Timeout(silence_timeout_s, connect=CONNECT_TIMEOUT_S)
    transport = EnvironmentTransport(environ, make_client)
    no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))
    return httpx2.AsyncClient(cookies=no_cookies, timeout=timeout, transport=transport, trust_env=False)


@asynccontextmanager
async def open_response(
    client: httpx2.AsyncClient, request: httpx2.Request, source: HttpSource
) -> AsyncIterator[httpx2.Response]:
    """Send a request and follow redirects, whose bodies are not read. Raises HTTP_ERRORS and Unavailable.

    A redirect to another host drops the credentials (httpx2's own rule; I12).
    """
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(HEAD_TIMEOUT_S):
                for _ in range(MAX_REDIRECTS + 1):
                    response = await client.send(request, stream=True, follow_redirects=False)
                    await stack.enter_async_context(aclosing(response))
                    if response.next_request is None:
                        break
                    request = response.next_request
                    await response.aclose()
        except TimeoutError:
            raise source.unavailable_error(
                f"{source.name} did not begin to answer within {HEAD_TIMEOUT_S:.0f} s; {source.hint}"
            ) from None
        if response.next_request is not None:
            raise source.unavailable_error(f"{source.name} redirects more than {MAX_REDIRECTS} times; {source.hint}")
        yield response


@asynccontextmanager
async def read_range(
    client: httpx2.AsyncClient,
    url: str,
    headers: Mapping[str, str],
    start: int,
    end: int,
    source: HttpSource,
    file: ManifestFile,
) -> AsyncIterator[Body]:
    """Read bytes [start, end) of a file. A server that ignores Range sends from 0: `begin` is the actual offset.

    Raises NotFound, Denied, RateLimited, Corrupt, HubUnavailable or Unavailable, naming the source.
    """
    wanted = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    try:
        for attempt in range(1, MAX_LINKS + 1):
            request = client.build_request("GET", url, headers=wanted)
            async with open_response(client, request, source) as response:
                if is_refused_link(request, response) and attempt < MAX_LINKS:
                    continue  # its signature may have expired: the hub makes a new one
                raise_for_response(request, response, source, file.path)
                check_body(response, source, file)
                yield Body(_offset(response, start, end, source), response.aiter_raw(CHUNK_BYTES))
                return
    except HTTP_ERRORS as e:
        raise map_http_error(e, source) from e


def _offset(response: httpx2.Response, start: int, end: int, source: HttpSource) -> int:
    if response.status_code != 206:
        return 0
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if not match or int(match.group(1)) != start:
        raise Corrupt(f"{source.name} sent another range than the requested bytes {start}-{end - 1}")
    return start


def origin_of(url: httpx2.URL) -> tuple[str, str, int | None]:
    """Return scheme, host and port."""
    return url.scheme, url.host, url.port


def is_refused_link(request: httpx2.Request, response: httpx2.Response) -> bool:
    """Return whether the hub redirected to a content network, and that refuses the link.

    The hub's own redirects, such as to https or that of a renamed model, lead to its own host and paths.
    """
    asked, answered = request.url, response.url
    is_hub = answered == asked or (answered.host == asked.host and any(part in answered.path for part in _HUB_PATHS))
    return not is_hub and 400 <= response.status_code < 500 and response.status_code not in _NO_REFUSALS


def raise_for_response(request: httpx2.Request, response: httpx2.Response, source: HttpSource, what: str) -> None:
    """Raise the error that an answer's status stands for. Only the hub itself denies (Denied) or lacks (NotFound)."""
    if is_refused_link(request, response):
        raise source.unavailable_error(
            f"{response.url.host}, to which {source.name} redirects, refused the link to {what} "
            f"(HTTP {response.status_code}): the link may have expired"
        )
    raise_for_status(response.status_code, response.headers, source)


def check_body(response: httpx2.Response, source: HttpSource, file: ManifestFile) -> None:
    """Raise Unavailable if something else than a file comes, Corrupt if it is a file of another size."""
    raise_for_encoding(response, source, "files", file.path)
    size_bytes = _whole_size(response)
    if size_bytes != file.size_bytes and not file.path.endswith((".html", ".htm")):
        raise_for_page(response, source, f"{file.path} ({format_bytes(file.size_bytes)})")
    if size_bytes not in (None, file.size_bytes):
        raise Corrupt(
            f"{source.name} has {size_bytes} bytes of {file.path} instead of the {file.size_bytes} that it lists"
        )


def raise_for_encoding(response: httpx2.Response, source: HttpSource, kind: str, path: str) -> None:
    """Raise Unavailable if an answer is compressed: none is asked for that way."""
    encoding = response.headers.get("content-encoding", "") or "identity"
    if encoding != "identity":
        raise source.unavailable_error(
            f"{source.name} compresses {kind} unasked ({path}: {encoding[:40]}, {_size_text(response)}); "
            f"{_ON_THE_WAY}"
        )


def raise_for_page(response: httpx2.Response, source: HttpSource, what: str) -> None:
    """Raise Unavailable if an answer is a web page."""
    content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in ("text/html", "application/xhtml+xml"):
        raise source.unavailable_error(
            f"{source.name} sent a web page ({content_type}, {_size_text(response)}) in place of {what}; "
            f"{_ON_THE_WAY}"
        )


def _whole_size(response: httpx2.Response) -> int | None:
    """Return the size of the whole file by an answer's head, if it says."""
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        return int(match[3]) if match and match[3] != "*" else None
    return _body_size(response)


def _body_size(response: httpx2.Response) -> int | None:
    length = response.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < _MAX_LENGTH_DIGITS else None


def _size_text(response: httpx2.Response) -> str:
    size_bytes = _body_size(response)
    return "size unknown" if size_bytes is None else format_bytes(size_bytes)


def raise_for_status(status: int, headers: Mapping[str, str], source: HttpSource) -> None:
    """Raise the error that a status stands for; none for 200 and 206."""
    name = source.name
    if status in (200, 206):
        return
    if headers.get("x-error-code") == "GatedRepo":
        raise Denied(f"this model is gated on {name}: accept its terms there, then {TOKEN_HINT}", source="hub")
    if status in (401, 403):
        hint = f"check the token, or {TOKEN_HINT}"
        raise Denied(f"{name} refused the credentials (HTTP {status}): {hint}", source="hub")
    if status == 404:
        raise NotFound(f"{name} does not have it (HTTP 404)")
    if status == 416:
        raise Corrupt(f"{name} has another size of this file than its listing says (HTTP 416)")
    if status == 429:
        wait_s = retry_after_s(headers)
        raise RateLimited(f"{name} limits our requests: retry in {wait_s:.0f} s (HTTP 429)", retry_after_s=wait_s)
    if status >= 500 or status == httpx2.codes.REQUEST_TIMEOUT:
        raise source.unavailable_error(f"{name} has an internal error (HTTP {status})")
    raise InternalError(f"{name} sent an unexpected status, HTTP {status}")


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds until a rate limit resets: `Retry-After: 12`, or the `t=12` of a RateLimit header."""
    after = headers.get("retry-after", "")
    if after.isascii() and after.isdigit():
        return min(float(after), _MAX_RETRY_S)
    match = _RATE_LIMIT_RESET.search(headers.get("ratelimit", ""))
    return min(float(match.group(1)), _MAX_RETRY_S) if match else _DEFAULT_RETRY_S


HTTP_ERRORS: tuple[type[Exception], ...] = (httpx2.HTTPError, httpx2.InvalidURL)
"""What httpx2 raises for network failures; its other errors are bugs of the caller."""


def was_timeout(error: ShoalError) -> bool:
    """Return whether a source was left because it sent nothing."""
    return isinstance(error, PeerTimeout) or isinstance(error.__cause__, httpx2.TimeoutException)


def map_http_error(error: Exception, source: HttpSource) -> ShoalError:
    """Return an error of the HTTP client as one of ours."""
    if isinstance(error, httpx2.TimeoutException):
        return source.unavailable_error(
            f"{source.name} sent nothing for too long ({type(error).__name__}); {source.hint}"
        )
    hint = _TRUST_HINT if "CERTIFICATE_VERIFY_FAILED" in str(error) else source.hint
    return source.unavailable_error(
        f"{source.name} is unreachable or the connection broke off: {error or type(error).__name__}; {hint}"
    )
