"""`GET /v1/probe?bytes=N`: N random bytes, with which placement measures the link to this node.

They come from memory, so that no disk is measured, and are random, so that no tunnel compresses them. The upload
limit does not apply: hidden states have none, and probes are few. The credential is a token as for a blob, for
`probe`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from shoal_common.bus import cluster_clock
from shoal_common.identity.peer_tokens import PROBE_NAME, PeerTokens
from shoal_fileserver.blob_api import denied, error_response

PATH = "/v1/probe"
MAX_PROBE_BYTES = 4 << 20
_PIECE = os.urandom(64 << 10)
_TYPE = "application/octet-stream"


class ProbeApi:
    """ASGI application for this path."""

    def __init__(self, tokens: PeerTokens) -> None:
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        await self._answer(Request(scope))(scope, receive, send)

    def _answer(self, request: Request) -> Response:
        if not self._tokens.allows(PROBE_NAME, request.headers, cluster_clock.now_s()):
            return denied()
        if request.method != "GET":
            return error_response(405, "use GET here", {"Allow": "GET"})
        requested = request.query_params.get("bytes", "0")
        if not (
            requested.isascii()
            and requested.isdecimal()
            and len(requested) < 10
            and int(requested) <= MAX_PROBE_BYTES
        ):
            return error_response(400, f"bytes is a number up to {MAX_PROBE_BYTES}")
        size = int(requested)
        headers = {"Content-Length": str(size), "Cache-Control": "no-store"}
        return (
            StreamingResponse(_pieces(size), headers=headers, media_type=_TYPE) if size else Response(headers=headers)
        )


async def _pieces(size_bytes: int) -> AsyncIterator[bytes]:
    for offset in range(0, size_bytes, len(_PIECE)):
        yield _PIECE[: size_bytes - offset]
