"""What peers ask of this node: ranges of blobs, whole or arriving, any run, leaf lists (docs/transfer.md).

    GET HEAD  /v1/blobs/<blob>                     one range
    POST      /v1/blobs/<blob>/any?max_leaves=N    body: the bitmap of the leaves that are wanted
    GET HEAD  /v1/leaves/<blob>                    the leaf list, with a range

Content is named by hash only, so no path comes from outside (I10). Only what shows that storage has hashed it is
served (I1, `shoal_common/proof.py`), and of what arrives only the leaves that the fetcher has verified. A token shows
one blob of this node for some minutes; without it every path answers the same 401 (I12).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from shoal_common import clock
from shoal_common.credentials import blob_token_shows
from shoal_common.errors import BadName
from shoal_common.layout import LEAF_BYTES, Layout, leaf_count
from shoal_common.logs import Log
from shoal_common.pace import Pace
from shoal_common.runs import MAX_RUN_LEAVES, from_bitmap
from shoal_fileserver.at_once import AtOnce
from shoal_fileserver.contents import Content, LeafList, open_content, open_leaf_list
from shoal_fileserver.ranges import Part, Unsatisfiable, Whole, parse_range
from shoal_fileserver.sending import SENDING, Sending
from shoal_fileserver.sent import Going, Sent

log = Log("fileserver")

MAX_BITMAP_BYTES = 256 << 10
"""Of a blob of 2 TiB."""
MAX_PAGE_BYTES = 1 << 20
"""Of a leaf list, for a request: the list of 32 GiB."""
BODY_DEADLINE_S = 10.0
_TYPE = "application/octet-stream"
_CLOSE = {"Connection": "close"}
_NOT_HERE = "this node does not hold that blob, verified"


class Blobs:
    """Answers peers from one store."""

    def __init__(self, layout: Layout, node: str, secret: str, at_once: AtOnce, sent: Sent, pace: Pace) -> None:
        self._layout, self._node, self._secret = layout, node, secret
        self._at_once, self._sent, self._pace = at_once, sent, pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application for the paths above."""
        await (await self._answer(scope, receive))(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        _, _, kind, blob, *rest = scope["path"].split("/")
        headers, method = Headers(scope=scope), scope["method"]
        if not blob_token_shows(self._secret, self._node, blob, headers, clock.now_s()):
            return problem(401, "show a token for this blob of this node")
        if kind == "blobs" and rest == ["any"]:
            if method != "POST":
                return _not_allowed("POST")
            return await self._refusing(blob, self._any(scope, receive, blob))
        if rest:
            return problem(404, "there is nothing here")
        if method not in ("GET", "HEAD"):
            return _not_allowed("GET, HEAD")
        if kind == "blobs":
            return await self._refusing(blob, self.blob(method, headers, blob, {}))
        return await self._refusing(blob, self._list(scope, blob))

    async def _refusing(self, blob: str, answer: Awaitable[Response]) -> Response:
        """The same answer, or why there is none."""
        try:
            return await answer
        except BadName as e:
            return problem(400, e.message)
        except FileNotFoundError:
            return problem(404, _NOT_HERE)
        except OSError as e:
            log.warning("a blob cannot be read", blob=blob, why=str(e))
            return problem(503, "this node cannot read that blob now", {"Retry-After": "5"})

    async def blob(self, method: str, headers: Headers, blob: str, named: Mapping[str, str]) -> Response:
        """A blob, or the part of it that is asked for, under these headers too. Raises BadName, OSError."""
        content = await asyncio.to_thread(open_content, self._layout, blob)
        size, said = content.size_bytes, {**content.headers, **named}
        asked = _asked(headers, said["ETag"], size)
        start, end = (asked.start, asked.end) if isinstance(asked, Part) else (0, size)
        if isinstance(asked, Unsatisfiable):
            content.close()
            return Response(status_code=416, headers={**said, "Content-Range": f"bytes */{size}"})
        if not content.has(start, end):
            content.close()
            return problem(404, "not all of that range can be relayed yet")
        if isinstance(asked, Part):
            said["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if method == "HEAD":
            content.close()
        elif end - start <= LEAF_BYTES:
            self._at_once.keep(content)
        going = None
        if method == "GET" and not start % LEAF_BYTES and (end == size or not end % LEAF_BYTES):
            going = self._sent.asked(blob, start // LEAF_BYTES, leaf_count(end), time.monotonic())
        status = 206 if isinstance(asked, Part) else 200
        return ContentResponse(content, start, end, status, said, self._pace, self._sent, going)

    async def of_hub(self, request: Request, sha256: str, named: Mapping[str, str]) -> Response:
        """The same, for a request in the hub's protocol."""
        return await self._refusing(sha256, self.blob(request.method, request.headers, sha256, named))

    async def _any(self, scope: Scope, receive: Receive, blob: str) -> Response:
        """The run that was sent least of what is wanted and here."""
        try:
            query = parse_qs(scope["query_string"].decode("ascii"), max_num_fields=8)
            asked = query.get("max_leaves", [str(MAX_RUN_LEAVES)])[-1]
        except ValueError:
            asked = ""
        if not (asked.isascii() and asked.isdigit() and len(asked) < 9 and int(asked) > 0):
            return problem(400, "max_leaves is no number of leaves from 1 on")
        try:
            async with asyncio.timeout(BODY_DEADLINE_S):
                body = await _body(receive, MAX_BITMAP_BYTES)
        except TimeoutError:
            return problem(408, "the bitmap did not come in time", _CLOSE)
        if body is None:
            return problem(413, f"a bitmap of at most {MAX_BITMAP_BYTES} bytes is expected", _CLOSE)
        content = await asyncio.to_thread(open_content, self._layout, blob)
        size = content.size_bytes
        if len(body) != -(-leaf_count(size) // 8):
            content.close()
            return problem(400, f"{len(body)} bytes are no bitmap of the {leaf_count(size)} leaves of this blob")
        going = self._sent.choose(blob, size, from_bitmap(body), content.leaves, int(asked), time.monotonic())
        if going is None:
            content.close()
            return Response(status_code=204, headers=content.headers)
        start, end = going.first * LEAF_BYTES, min(going.end * LEAF_BYTES, size)
        said = {**content.headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        return ContentResponse(content, start, end, 206, said, self._pace, self._sent, going)

    async def _list(self, scope: Scope, blob: str) -> Response:
        """A page of a leaf list."""
        found = await asyncio.to_thread(open_leaf_list, self._layout, blob)
        try:
            size = found.size_bytes
            # Without a root it grows from page to page: nothing may keep it.
            said = {"ETag": f'"{found.root}"'} if found.root else {"Cache-Control": "no-store"}
            said["Accept-Ranges"] = "bytes"
            asked = _asked(Headers(scope=scope), said.get("ETag", ""), size)
            if isinstance(asked, Unsatisfiable):
                return Response(status_code=416, headers={**said, "Content-Range": f"bytes */{size}"})
            if isinstance(asked, Whole) and size > MAX_PAGE_BYTES:
                return problem(400, f"this list has {size} bytes: ask for a range of at most {MAX_PAGE_BYTES}")
            return await _page(scope["method"], found, asked, said)
        finally:
            found.close()


async def _page(method: str, found: LeafList, asked: Whole | Part, said: dict[str, str]) -> Response:
    start, end, status = 0, found.size_bytes, 200
    if isinstance(asked, Part):
        start, end, status = asked.start, min(asked.end, asked.start + MAX_PAGE_BYTES), 206
        said["Content-Range"] = f"bytes {start}-{end - 1}/{found.size_bytes}"
    if method == "HEAD":
        return Response(status_code=status, headers={**said, "Content-Length": str(end - start)}, media_type=_TYPE)
    page = await asyncio.to_thread(found.read, start, end)
    return Response(page, status, said, media_type=_TYPE)


class ContentResponse(Response):
    """Bytes [start, end) of a blob; closes it, and tells `sent` which leaves have gone."""

    def __init__(
        self,
        content: Content,
        start: int,
        end: int,
        status: int,
        headers: Mapping[str, str],
        pace: Pace,
        sent: Sent,
        going: Going | None,
    ) -> None:
        self.status_code, self.background, self.body = status, None, b""
        self.media_type = _TYPE
        self.init_headers({**headers, "Content-Length": str(end - start)})
        self._content, self._start, self._end, self._pace = content, start, end, pace
        self._sent, self._going = sent, going

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        content, count = self._content, 0
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                way: Sending = scope["state"][SENDING]
                count = await way.file(content.file, self._start, self._end, self._pace, lambda: content.discarded)
                if count < self._end - self._start:
                    way.abort()
                    return
            await send({"type": "http.response.body"})
        finally:
            content.close()
            if self._going is not None:
                at = self._start + count
                through = at // LEAF_BYTES if at < self._end else leaf_count(at)
                self._sent.ended(self._going, through, time.monotonic())


def _asked(headers: Headers, etag: str, size: int) -> Whole | Part | Unsatisfiable:
    # Several Range headers are several ranges; a part of another version than ours is no part of this blob.
    header = ",".join(headers.getlist("range")) or None
    return parse_range(header if headers.get("if-range", etag) == etag else None, size)


async def _body(receive: Receive, most_bytes: int) -> bytes | None:
    """A request's body; None when it is longer, or the peer has gone."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most_bytes or message["type"] == "http.disconnect":
            return None
        if not message.get("more_body"):
            return bytes(body)


def _not_allowed(methods: str) -> Response:
    return problem(405, f"only {methods} can be asked here", {"Allow": methods})


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that says what is wrong."""
    return JSONResponse({"error": {"message": message}}, status, headers)
