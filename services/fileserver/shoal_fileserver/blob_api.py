"""The API for peers: ranges of complete or partial blobs, any wanted leaves, leaf lists (docs/transfer.md).

    GET HEAD  /v1/blobs/<blob>                     one range
    POST      /v1/blobs/<blob>/any?max_leaves=N    body: bitmap of the wanted leaves
    GET HEAD  /v1/leaves/<blob>                    the leaf list, with a range

Content is named by hash only, so no path comes from outside (I10). Only stamped files are served (I1,
`verification_stamp.py`), and of partial blobs only the leaves that the fetcher has verified. A token allows reading
one blob of this node for some minutes; without it every path answers the same 401 (I12).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from shoal_common.bus import cluster_clock
from shoal_common.errors import ShoalError
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.identity.seals import SEAL_HEADER
from shoal_common.logs import StructuredLogger
from shoal_common.store.bitmap import LEAF_BYTES, leaf_count
from shoal_common.store.leaf_set import MAX_RANGE_LEAVES, from_bitmap
from shoal_common.store.store_paths import StorePaths
from shoal_fileserver.blob_content import BlobContent, LeafList, open_content, open_leaf_list
from shoal_fileserver.http.fast_path import FastPath
from shoal_fileserver.http.ranges import AllBytes, ByteRange, Unsatisfiable, parse_range
from shoal_fileserver.http.sendfile import FILE_SENDER_KEY, FileSender
from shoal_fileserver.send_history import InFlightLeaves, SendHistory

log = StructuredLogger("fileserver")
P = ParamSpec("P")
T = TypeVar("T")

MAX_LEAF_LIST_BYTES = 1 << 20
"""Maximum part of a leaf list per request: the list of 32 GiB."""
_OPENING_THREADS = 8
_TYPE = "application/octet-stream"
_NOT_HERE = "this node does not hold that blob, verified"


class BlobApi:
    """Answers peers from one store."""

    def __init__(
        self, layout: StorePaths, tokens: PeerTokens, fast_path: FastPath, sent: SendHistory, limiter: RateLimiter
    ) -> None:
        self._layout, self._tokens = layout, tokens
        self._fast_path, self._sent, self._limiter = fast_path, sent, limiter
        self._opening = ThreadPoolExecutor(_OPENING_THREADS, "open")

    async def _opened(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Open a file. Not in a shared thread: a blob may be in a library whose file system hangs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._opening, partial(call, *args, **kwargs))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request for the paths above, as an ASGI application."""
        await (await self._answer(scope, receive))(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        _, _, kind, blob, *rest = scope["path"].split("/")
        headers, method = Headers(scope=scope), scope["method"]
        if not self._tokens.allows(blob, headers, cluster_clock.now_s()):
            return denied()
        if kind == "blobs" and rest == ["any"]:
            if method != "POST":
                return _not_allowed("POST")
            return await self._or_error(blob, self._any(scope, receive, blob))
        if rest:
            return error_response(404, "there is nothing at this path")
        if method not in ("GET", "HEAD"):
            return _not_allowed("GET, HEAD")
        if kind == "blobs":
            return await self._or_error(blob, self.blob(method, headers, blob, {}))
        return await self._or_error(blob, self._list(scope, blob))

    async def _or_error(self, blob: str, response: Awaitable[Response]) -> Response:
        """Return the response, or the error response of what it raises."""
        try:
            return await response
        except ShoalError as e:
            return error_response(e.http_status, e.message)
        except FileNotFoundError:
            return error_response(404, _NOT_HERE)
        except OSError as e:
            log.warning("blob cannot be read", blob=blob, reason=str(e))
            return error_response(503, "this node cannot read that blob now", {"Retry-After": "5"})

    async def blob(self, method: str, headers: Headers, blob: str, named: Mapping[str, str]) -> Response:
        """Respond with a blob or the requested range of it, adding these headers. Raises BadName, OSError."""
        content = await self._opened(open_content, self._layout, blob)
        size, response_headers = content.size_bytes, {**content.headers, **named}
        byte_range = _requested_range(headers, response_headers["ETag"], size)
        start, end = (byte_range.start, byte_range.end) if isinstance(byte_range, ByteRange) else (0, size)
        if isinstance(byte_range, Unsatisfiable):
            content.close()
            return Response(status_code=416, headers={**response_headers, "Content-Range": f"bytes */{size}"})
        if not content.has(start, end):
            content.close()
            return error_response(404, "parts of that range cannot be relayed yet")
        if isinstance(byte_range, ByteRange):
            response_headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if method == "HEAD":
            content.close()
        elif end - start <= LEAF_BYTES:
            self._fast_path.keep_open(content)
        in_flight = None
        if method == "GET" and not start % LEAF_BYTES and (end == size or not end % LEAF_BYTES):
            in_flight = self._sent.record_requested(blob, start // LEAF_BYTES, leaf_count(end), time.monotonic())
        status = 206 if isinstance(byte_range, ByteRange) else 200
        return ContentResponse(content, start, end, status, response_headers, self._limiter, self._sent, in_flight)

    async def respond_to_hub_client(self, request: Request, sha256: str, named: Mapping[str, str]) -> Response:
        """Respond with a blob, for a request in the hub's protocol."""
        return await self._or_error(sha256, self.blob(request.method, request.headers, sha256, named))

    async def _any(self, scope: Scope, receive: Receive, blob: str) -> Response:
        """Respond with the least sent range of leaves that are wanted and available."""
        try:
            query = parse_qs(scope["query_string"].decode("ascii"), max_num_fields=8)
            max_leaves = query.get("max_leaves", [str(MAX_RANGE_LEAVES)])[-1]
        except ValueError:
            max_leaves = ""
        if not (max_leaves.isascii() and max_leaves.isdigit() and len(max_leaves) < 9 and int(max_leaves) > 0):
            return error_response(400, "max_leaves is not a number of leaves from 1 on")
        body = await _body(receive)
        content = await self._opened(open_content, self._layout, blob)
        size = content.size_bytes
        if len(body) != -(-leaf_count(size) // 8):
            content.close()
            return error_response(400, f"{len(body)} bytes are not a bitmap of this blob's {leaf_count(size)} leaves")
        in_flight = self._sent.pick_next(
            blob, size, from_bitmap(body), content.leaves, int(max_leaves), time.monotonic()
        )
        if in_flight is None:
            content.close()
            return Response(status_code=204, headers=content.headers)
        start, end = in_flight.first * LEAF_BYTES, min(in_flight.end * LEAF_BYTES, size)
        response_headers = {**content.headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        return ContentResponse(content, start, end, 206, response_headers, self._limiter, self._sent, in_flight)

    async def _list(self, scope: Scope, blob: str) -> Response:
        """Respond with a page of a leaf list."""
        leaf_list = await self._opened(open_leaf_list, self._layout, blob)
        try:
            size = leaf_list.size_bytes
            # Without a digest the list grows between pages: it must not be cached.
            response_headers = (
                {"ETag": f'"{leaf_list.digest}"'} if leaf_list.digest else {"Cache-Control": "no-store"}
            )
            response_headers["Accept-Ranges"] = "bytes"
            if leaf_list.seal:
                response_headers[SEAL_HEADER] = leaf_list.seal
            byte_range = _requested_range(Headers(scope=scope), response_headers.get("ETag", ""), size)
            if isinstance(byte_range, Unsatisfiable):
                return Response(status_code=416, headers={**response_headers, "Content-Range": f"bytes */{size}"})
            if isinstance(byte_range, AllBytes) and size > MAX_LEAF_LIST_BYTES:
                return error_response(
                    400, f"this list has {size} bytes: request a range of at most {MAX_LEAF_LIST_BYTES}"
                )
            return await _page(scope["method"], leaf_list, byte_range, response_headers)
        finally:
            leaf_list.close()


async def _page(
    method: str, leaf_list: LeafList, byte_range: AllBytes | ByteRange, response_headers: dict[str, str]
) -> Response:
    start, end, status = 0, leaf_list.size_bytes, 200
    if isinstance(byte_range, ByteRange):
        start, end, status = byte_range.start, min(byte_range.end, byte_range.start + MAX_LEAF_LIST_BYTES), 206
        response_headers["Content-Range"] = f"bytes {start}-{end - 1}/{leaf_list.size_bytes}"
    if method == "HEAD":
        return Response(
            status_code=status, headers={**response_headers, "Content-Length": str(end - start)}, media_type=_TYPE
        )
    page = await asyncio.to_thread(leaf_list.read, start, end)
    return Response(page, status, response_headers, media_type=_TYPE)


class ContentResponse(Response):
    """Bytes [start, end) of a blob. Closes the blob, and records the leaves that were sent."""

    def __init__(
        self,
        content: BlobContent,
        start: int,
        end: int,
        status: int,
        headers: Mapping[str, str],
        limiter: RateLimiter,
        sent: SendHistory,
        in_flight: InFlightLeaves | None,
    ) -> None:
        self.status_code, self.background, self.body = status, None, b""
        self.media_type = _TYPE
        self.init_headers({**headers, "Content-Length": str(end - start)})
        self._content, self._start, self._end, self._limiter = content, start, end, limiter
        self._sent, self._in_flight = sent, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        content, count = self._content, 0
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                sending: FileSender = scope["state"][FILE_SENDER_KEY]
                count = await sending.send_file(
                    content.file, self._start, self._end, self._limiter, lambda: content.is_discarded
                )
                if count < self._end - self._start:
                    sending.abort()
                    return
            await send({"type": "http.response.body"})
        finally:
            content.close()
            if self._in_flight is not None:
                position = self._start + count
                through = position // LEAF_BYTES if position < self._end else leaf_count(position)
                self._sent.record_finished(self._in_flight, through, time.monotonic())


def _requested_range(headers: Headers, etag: str, size: int) -> AllBytes | ByteRange | Unsatisfiable:
    # Several Range headers are several ranges; If-Range with another ETag means another blob's bytes.
    header = ",".join(headers.getlist("range")) or None
    return parse_range(header if headers.get("if-range", etag) == etag else None, size)


async def _body(receive: Receive) -> bytes:
    """Return a request's body, or what arrived of it before the peer disconnected."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _not_allowed(methods: str) -> Response:
    return error_response(405, f"use {methods} here", {"Allow": methods})


def denied() -> Response:
    """Return the response to a request without a valid token, whatever it asks for."""
    return error_response(401, "send a token for this blob of this node")


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error response."""
    return JSONResponse({"error": {"message": message}}, status, headers)
