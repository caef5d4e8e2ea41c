"""Reading a request and answering it: bodies with a limit, JSON both ways, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from shoal_common.messages import decode
from shoal_gateway.errors import TooLarge

T = TypeVar("T")

MAX_BODY_BYTES = 8 << 20


def plain(value: Any) -> Any:
    """A value as JSON has it, with every field: messages leave defaults out, an API had better not."""
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    body = msgspec.json.encode(plain(value))
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def _too_large() -> TooLarge:
    return TooLarge(f"a request's body may have {MAX_BODY_BYTES} bytes at most", limit_bytes=MAX_BODY_BYTES)


async def read_body(request: Request) -> bytes:
    """The whole body. Raises TooLarge as soon as that is known."""
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > MAX_BODY_BYTES:
        raise _too_large()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise _too_large()
    return bytes(body)


async def read_as(request: Request, kind: type[T]) -> T:
    """The body as `kind`. Raises BadMessage naming the place that is wrong."""
    return decode(await read_body(request), kind)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; when the client goes first, `work` is cancelled and ClientDisconnect raised.

    Returns only after `work` has ended, its clearing-up included. The body must have been read before.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.wait({working, gone})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
