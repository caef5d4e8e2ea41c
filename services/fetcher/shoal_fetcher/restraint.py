"""What keeps a node from asking the hub more than it has to: what it knows already, and what the hub wants.

A commit's files never change, so their listing is kept. What a branch means is asked every time, with the ETag of the
last answer. Who asks while the same is being asked waits for that answer. And when the hub wants fewer requests,
nothing of this node asks it before the time it names.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

import httpx2

from shoal_common.messages.records import ManifestFile
from shoal_fetcher.errors import RateLimited

T = TypeVar("T")

MOST_FILES = 20_000
"""In all listings that are kept."""
MOST_ANSWER_BYTES = 16 << 20
"""Of all answers that are kept with their ETags."""


class HoldBack:
    """Until when the hub wants no request. Any thread may ask."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s, self._until_s = clock_s, 0.0

    def note(self, limited: RateLimited) -> None:
        """The hub has said when to come back."""
        self._until_s = max(self._until_s, self._clock_s() + limited.retry_after_s)

    def check(self, who: str) -> None:
        """Raise RateLimited, saying how long, when it is not time yet."""
        left_s = self._until_s - self._clock_s()
        if left_s > 0:
            raise RateLimited(f"{who} wants us to wait {max(left_s, 1):.0f} s (HTTP 429)", retry_after_s=left_s)


class Listings:
    """The files of commits, the least lately used forgotten first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], list[ManifestFile]] = OrderedDict()

    def get(self, repo: str, commit: str) -> list[ManifestFile] | None:
        """The files of a commit, if they are known."""
        found = self._kept.get((repo, commit))
        if found is not None:
            self._kept.move_to_end((repo, commit))
        return found

    def keep(self, repo: str, commit: str, files: list[ManifestFile]) -> None:
        """These are the files of a commit, for ever."""
        self._kept[repo, commit] = files
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > MOST_FILES:
            self._kept.popitem(last=False)


class Answers:
    """Answers with an ETag, by address: asked again, one that has not changed costs the hub next to nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, httpx2.Response] = OrderedDict()

    def prepare(self, request: httpx2.Request) -> None:
        """Ask for what is not known already."""
        with self._lock:
            known = self._kept.get(str(request.url))
        if known is not None:
            request.headers["If-None-Match"] = known.headers["ETag"]

    def settle(self, request: httpx2.Request, response: httpx2.Response) -> httpx2.Response:
        """The answer that counts: for a 304 the one that is known; what is new is kept. Its body has been read."""
        address = str(request.url)
        with self._lock:
            if response.status_code == 304 and address in self._kept:
                self._kept.move_to_end(address)
                return _copy(self._kept[address], request)
            if response.status_code == 200 and response.headers.get("ETag"):
                self._kept[address] = _copy(response, request)
                self._kept.move_to_end(address)
            while sum(len(r.content) for r in self._kept.values()) > MOST_ANSWER_BYTES:
                self._kept.popitem(last=False)
        return response


def _copy(of: httpx2.Response, request: httpx2.Request) -> httpx2.Response:
    # Its content is decoded already, so that its headers must not say how it was encoded.
    headers = {k: v for k, v in of.headers.items() if k.lower() not in ("content-encoding", "content-length")}
    return httpx2.Response(of.status_code, headers=headers, content=of.content, request=request)


class Once(Generic[T]):
    """Work that several want at the same time is done once, for as long as it takes."""

    def __init__(self) -> None:
        self._doing: dict[Hashable, asyncio.Task[T]] = {}

    async def __call__(self, key: Hashable, do: Callable[[], Awaitable[T]]) -> T:
        """What `do` gives, begun now or by somebody before. Who is cancelled takes it from nobody else."""
        if key not in self._doing:
            task = asyncio.ensure_future(do())
            self._doing[key] = task
            task.add_done_callback(lambda t: self._ended(key, t))
        return await asyncio.shield(self._doing[key])

    def _ended(self, key: Hashable, task: asyncio.Task[T]) -> None:
        del self._doing[key]
        if not task.cancelled():
            task.exception()  # perhaps nobody waits any more
