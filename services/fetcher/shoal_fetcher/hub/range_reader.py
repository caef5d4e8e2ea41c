"""Reads a byte range of a file from the hub, and maps HTTP errors to ours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2
import msgspec

from shoal_common.errors import Corrupt, Denied, HubUnavailable, InternalError, NotFound, ShoalError, Unavailable
from shoal_fetcher.errors import PeerTimeout, RateLimited

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0
"""A source that sends nothing for this long is left."""
HEAD_TIMEOUT_S = 60.0
"""From a request to the head of its answer, redirects included, however many bytes trickle in."""
MAX_REDIRECTS = 5
CHUNK_BYTES = 256 << 10
_MAX_CONNECTIONS = 32
_DEFAULT_RETRY_S = 5.0
_MAX_RETRY_S = 900.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_RATE_LIMIT_RESET = re.compile(r"\bt=(\d+)")


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


def make_hub_client(silence_timeout_s: float = SILENCE_TIMEOUT_S) -> httpx2.AsyncClient:
    """Return a client for the hub that uses the environment's proxies, and keeps no cookies."""
    return httpx2.AsyncClient(
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        timeout=httpx2.Timeout(silence_timeout_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS),
        trust_env=True,
    )


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
    client: httpx2.AsyncClient, url: str, headers: Mapping[str, str], start: int, end: int, source: HttpSource
) -> AsyncIterator[Body]:
    """Read bytes [start, end). A server that ignores Range sends from 0: `begin` is the actual offset.

    Raises NotFound, Denied, RateLimited, Corrupt, HubUnavailable or Unavailable, naming the source.
    """
    wanted = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    try:
        request = client.build_request("GET", url, headers=wanted)
        async with open_response(client, request, source) as response:
            raise_for_status(response.status_code, response.headers, source)
            begin = 0
            if response.status_code == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
                if not match or int(match.group(1)) != start:
                    raise Corrupt(f"{source.name} sent another range than the requested bytes {start}-{end - 1}")
                begin = start
            yield Body(begin, response.aiter_raw(CHUNK_BYTES))
    except HTTP_ERRORS as e:
        raise map_http_error(e, source) from e


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
        raise source.unavailable_error(f"{name} has an internal error (HTTP {status}); try again later")
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
    return source.unavailable_error(
        f"{source.name} is unreachable or the connection broke off: {error or type(error).__name__}; {source.hint}"
    )
