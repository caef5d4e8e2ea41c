"""Caches and back-off that keep a node's requests to the hub few.

The listing of a commit never changes and is kept. A branch is resolved every time, with the ETag of the last answer.
After a 429, no request of this node goes out before the time that the hub
named.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

import httpx2

from shoal_common.messages.manifest import ManifestFile
from shoal_fetcher.errors import RateLimited

MAX_CACHED_FILES = 20_000
"""In all kept listings together."""
MAX_CACHED_ANSWER_BYTES = 16 << 20
"""Of all kept answers with an ETag together."""


class HubBackoff:
    """The time before which the hub wants no request."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s, self._until_s = clock_s, 0.0

    def record(self, limited: RateLimited) -> None:
        """Record the hub's Retry-After."""
        self._until_s = max(self._until_s, self._clock_s() + limited.retry_after_s)

    def check(self, source: str) -> None:
        """Raise RateLimited, with the seconds left, if it is too early."""
        left_s = self._until_s - self._clock_s()
        if left_s > 0:
            raise RateLimited(
                f"{source} limits our requests: retry in {max(left_s, 1):.0f} s (HTTP 429)", retry_after_s=left_s
            )


class ListingCache:
    """LRU cache of the files of commits."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str], list[ManifestFile]] = OrderedDict()

    def get(self, repo: str, commit: str) -> list[ManifestFile] | None:
        """Return the files of a commit, or None if they are not cached."""
        files = self._entries.get((repo, commit))
        if files is not None:
            self._entries.move_to_end((repo, commit))
        return files

    def put(self, repo: str, commit: str, files: list[ManifestFile]) -> None:
        """Cache the files of a commit."""
        self._entries[repo, commit] = files
        while len(self._entries) > 1 and sum(map(len, self._entries.values())) > MAX_CACHED_FILES:
            self._entries.popitem(last=False)


class ETagCache:
    """LRU cache of answers with an ETag, by URL: revalidating one costs the hub next to nothing."""

    def __init__(self) -> None:
        self._responses: OrderedDict[str, httpx2.Response] = OrderedDict()

    def add_etag(self, request: httpx2.Request) -> None:
        """Add If-None-Match if an answer is cached."""
        known = self._responses.get(str(request.url))
        if known is not None:
            request.headers["If-None-Match"] = known.headers["ETag"]

    def resolve(self, request: httpx2.Request, response: httpx2.Response) -> httpx2.Response:
        """Return the cached answer for a 304, else the response, which is cached. Its body has been read."""
        address = str(request.url)
        if response.status_code == 304 and address in self._responses:
            self._responses.move_to_end(address)
            return _copy(self._responses[address], request)
        if response.status_code == 200 and response.headers.get("ETag"):
            self._responses[address] = _copy(response, request)
            self._responses.move_to_end(address)
        while sum(len(r.content) for r in self._responses.values()) > MAX_CACHED_ANSWER_BYTES:
            self._responses.popitem(last=False)
        return response


def _copy(response: httpx2.Response, request: httpx2.Request) -> httpx2.Response:
    # The content is decoded already, so the headers must not say how it was encoded.
    headers = {k: v for k, v in response.headers.items() if k.lower() not in ("content-encoding", "content-length")}
    return httpx2.Response(response.status_code, headers=headers, content=response.content, request=request)
