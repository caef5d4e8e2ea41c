"""Reading a byte range of a file from the hub; and what its failures are called here."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx2
import msgspec

from shoal_common.errors import Corrupt, Denied, Failed, HubUnavailable, NotFound, ShoalError, Unavailable
from shoal_fetcher.errors import RateLimited, Silent

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0
"""A source that sends nothing for so long is given up."""
CHUNK_BYTES = 256 << 10
_MAX_CONNECTIONS = 32
_DEFAULT_RETRY_S = 5.0
_MAX_RETRY_S = 900.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_RATE_LIMIT_RESET = re.compile(r"\bt=(\d+)")


_HUB_REMEDY = "check the connection, or HF_ENDPOINT"


class Source(msgspec.Struct, frozen=True):
    """Who serves, as messages name it; what to set when it refuses us; what its being away is called; what to do."""

    name: str
    credential: str
    away: type[Unavailable]
    remedy: str


def hub_source(endpoint: str) -> Source:
    """The hub as a source. What its address may hold of a password is not for messages."""
    return Source(f"hub {endpoint.rpartition('//')[2].rpartition('@')[2]}", "HF_TOKEN", HubUnavailable, _HUB_REMEDY)


class Body(msgspec.Struct, frozen=True):
    """A body that is being read: where its first byte belongs, and its chunks."""

    begin: int
    chunks: AsyncIterator[bytes]


def hub_client(silence_s: float = SILENCE_TIMEOUT_S) -> httpx2.AsyncClient:
    """A client for the hub: by the environment's proxies, and through redirects.

    A redirect to another host drops the credentials (httpx2's own rule; I12).
    """
    return httpx2.AsyncClient(
        follow_redirects=True,
        timeout=httpx2.Timeout(silence_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS),
        trust_env=True,
    )


@asynccontextmanager
async def read_range(
    client: httpx2.AsyncClient, url: str, headers: Mapping[str, str], start: int, end: int, source: Source
) -> AsyncIterator[Body]:
    """Read bytes [start, end). A server that ignores Range answers from 0: `begin` says where we are.

    Raises NotFound, Denied, RateLimited, Corrupt, HubUnavailable or Unavailable, naming the source.
    """
    request = {**headers, "Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    try:
        async with client.stream("GET", url, headers=request) as response:
            raise_for(response.status_code, response.headers, source)
            begin = 0
            if response.status_code == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
                if not match or int(match.group(1)) != start:
                    raise Corrupt(f"{source.name} answered another range than bytes {start}-{end - 1} was asked for")
                begin = start
            yield Body(begin, response.aiter_raw(CHUNK_BYTES))
    except FOREIGN as e:
        raise foreign(e, source) from e


def raise_for(status: int, headers: Mapping[str, str], source: Source) -> None:
    """Raise what a status means; 200 and 206 mean nothing."""
    who = source.name
    if status in (200, 206):
        return
    if headers.get("x-error-code") == "GatedRepo":
        raise Denied(
            f"this model is gated on {who}: accept its terms there, and set {source.credential} to your token"
        )
    if status in (401, 403):
        raise Denied(
            f"{who} refuses our credentials (HTTP {status}): set {source.credential} to one that may read it"
        )
    if status == 404:
        raise NotFound(f"{who} does not have it (HTTP 404)")
    if status == 416:
        raise Corrupt(f"{who} has another size for this file than its listing says (HTTP 416)")
    if status == 429:
        wait_s = retry_after_s(headers)
        raise RateLimited(f"{who} wants us to wait {wait_s:.0f} s (HTTP 429)", retry_after_s=wait_s)
    if status >= 500:
        raise source.away(f"{who} has a fault of its own (HTTP {status}); try again later")
    raise Failed(f"{who} answered HTTP {status}, which makes no sense here")


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds until a rate limit resets: `Retry-After: 12`, or the `t=12` of a RateLimit header."""
    after = headers.get("retry-after", "")
    if after.isascii() and after.isdigit():
        return min(float(after), _MAX_RETRY_S)
    match = _RATE_LIMIT_RESET.search(headers.get("ratelimit", ""))
    return min(float(match.group(1)), _MAX_RETRY_S) if match else _DEFAULT_RETRY_S


FOREIGN: tuple[type[Exception], ...] = (httpx2.HTTPError, httpx2.InvalidURL)
"""What httpx2 raises for reasons that are not ours; its other classes mean that it was used wrongly."""


def was_silent(error: ShoalError) -> bool:
    """Whether a source was left because it sent nothing."""
    return isinstance(error, Silent) or isinstance(error.__cause__, httpx2.TimeoutException)


def foreign(error: Exception, source: Source) -> ShoalError:
    """An error of the HTTP client as one of ours."""
    if isinstance(error, httpx2.TimeoutException):
        return source.away(f"{source.name} was silent for too long ({type(error).__name__}); {source.remedy}")
    return source.away(
        f"{source.name} cannot be reached or broke off: {error or type(error).__name__}; {source.remedy}"
    )
