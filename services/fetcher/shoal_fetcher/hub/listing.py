"""Has huggingface_hub ask the hub, within bounds.

The library blocks a thread, sets no timeout, and follows links for as long as the hub sends some. So its HTTP client
does no I/O: it hands each request to the loop, which reads the answer within the bounds of the call. When the call is
over, so is its request, and the thread ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import httpx2
from huggingface_hub import set_client_factory

from shoal_common.concurrency.threads import start_daemon_call
from shoal_common.errors import Cancelled, Expired, Unsupported
from shoal_fetcher.errors import RateLimited
from shoal_fetcher.hub import range_reader
from shoal_fetcher.hub.cache import ETagCache, HubBackoff
from shoal_fetcher.hub.range_reader import HttpSource

T = TypeVar("T")

CALL_TIMEOUT_S = 60.0
"""Of one call, all its requests together: 100 pages of a hub that takes half a second for each."""
MAX_REQUESTS = 100
"""Of one call. A page of Hugging Face has 1,000 entries, and its largest repositories tens of thousands."""
MAX_ANSWER_BYTES = 8 << 20
"""Of one answer: a page has half a MiB, and the names of 50,000 files, which a revision has in one answer, 5 MiB. As
JSON it becomes objects of ten times the size."""
MAX_CALL_BYTES = 64 << 20
"""Of all answers to one call."""
_MAX_CONCURRENT_CALLS = 8


class HubCalls:
    """Runs calls of huggingface_hub, each in a thread of its own, which ends with the call."""

    def __init__(self, endpoint: str, source: HttpSource, client: httpx2.AsyncClient, backoff: HubBackoff) -> None:
        self.origin = range_reader.origin_of(httpx2.URL(endpoint))
        self.source, self.client, self.backoff, self.answers = source, client, backoff, ETagCache()
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT_CALLS)
        # huggingface_hub has one client per process, and a fetcher has one hub.
        set_client_factory(lambda: httpx2.Client(transport=_CallTransport(), trust_env=False))

    async def run(self, call: Callable[[], T]) -> T:
        """Return what a blocking call of the library returns. Raises Expired, and what the call raises.

        Its requests raise our errors: RateLimited, HubUnavailable, Unsupported.
        """
        async with self._slots:
            requests = _CallRequests(self)

            def ask_hub() -> T:
                _REQUESTS.set(requests)
                return call()

            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    return await start_daemon_call(ask_hub)
            except TimeoutError:
                raise Expired(f"{self.source.name} did not answer within {CALL_TIMEOUT_S:.0f} s; try again") from None
            finally:
                requests.end()


class _CallRequests:
    """The HTTP requests of one call: counted, one at a time, none after its end."""

    def __init__(self, calls: HubCalls) -> None:
        self._calls, self._loop = calls, asyncio.get_running_loop()
        self._count = self._bytes = 0
        self._running: asyncio.Task[httpx2.Response] | None = None
        self._has_ended = False

    def send(self, request: httpx2.Request) -> httpx2.Response:
        """Return the answer, its body read. Blocks the call's thread."""
        return asyncio.run_coroutine_threadsafe(self._send(request), self._loop).result()

    def end(self) -> None:
        """Make the request under way fail, and all later ones. Call it on the loop."""
        self._has_ended = True
        if self._running is not None:
            self._running.cancel()

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        if self._has_ended:
            raise Cancelled("nobody waits for this listing any more")
        self._running = asyncio.current_task()
        name, backoff, answers = self._calls.source.name, self._calls.backoff, self._calls.answers
        self._count += 1
        if self._count > MAX_REQUESTS:
            raise Unsupported(f"{name} lists more than {MAX_REQUESTS} pages, the most that Shoal reads of a model")
        backoff.check(name)
        try:
            response = await self._read(self._without_encoding(request))
        except RateLimited as e:
            backoff.record(e)
            raise
        return answers.resolve(request, response) if _names_revision(request) else response

    def _without_encoding(self, request: httpx2.Request) -> httpx2.Request:
        """Return the request as it is sent: a few compressed bytes could be gigabytes."""
        sent = self._calls.client.build_request(request.method, request.url, headers=request.headers)
        sent.headers["Accept-Encoding"] = "identity"
        if range_reader.origin_of(request.url) != self._calls.origin:
            sent.headers.pop("Authorization", None)  # a page's link may lead anywhere (I12)
        if _names_revision(request):
            self._calls.answers.add_etag(sent)
        return sent

    async def _read(self, request: httpx2.Request) -> httpx2.Response:
        source = self._calls.source
        try:
            async with range_reader.open_response(self._calls.client, request, source) as response:
                status = response.status_code
                # The library would wait and try these again.
                if status in (httpx2.codes.REQUEST_TIMEOUT, httpx2.codes.TOO_MANY_REQUESTS) or status >= 500:
                    range_reader.raise_for_status(status, response.headers, source)
                path = request.url.path
                if range_reader.is_refused_link(request, response):
                    range_reader.raise_for_response(request, response, source, path)
                range_reader.raise_for_encoding(response, source, "listings", path)
                if status == httpx2.codes.OK:
                    range_reader.raise_for_page(response, source, f"the listing {path}")
                return httpx2.Response(status, headers=response.headers, content=await self._body(response))
        except range_reader.HTTP_ERRORS as e:
            raise range_reader.map_http_error(e, source) from e

    async def _body(self, response: httpx2.Response) -> bytes:
        body, name = bytearray(), self._calls.source.name
        async for chunk in response.aiter_raw(range_reader.CHUNK_BYTES):
            body += chunk
            self._bytes += len(chunk)
            if len(body) > MAX_ANSWER_BYTES:
                raise Unsupported(f"{name} sends more than {MAX_ANSWER_BYTES >> 20} MiB as one page of a listing")
            if self._bytes > MAX_CALL_BYTES:
                raise Unsupported(f"{name} sends more than {MAX_CALL_BYTES >> 20} MiB as one listing")
        return bytes(body)


_REQUESTS: ContextVar[_CallRequests] = ContextVar("_REQUESTS")


class _CallTransport(httpx2.BaseTransport):
    """The transport of huggingface_hub's client."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return _REQUESTS.get().send(request)


def _names_revision(request: httpx2.Request) -> bool:
    return "/revision/" in request.url.path
