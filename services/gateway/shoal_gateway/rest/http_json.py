"""Read and answer requests: JSON both ways, and detection of client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive

from shoal_common.messages import decode

T = TypeVar("T")


def to_json_with_defaults(value: Any) -> Any:
    """Return a value for JSON with every field: messages omit defaults, an API should not."""
    if isinstance(value, msgspec.Struct):
        return {name: to_json_with_defaults(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return {k: to_json_with_defaults(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_with_defaults(v) for v in value]
    return value


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response."""
    body = msgspec.json.encode(to_json_with_defaults(value))
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


async def read_body_as(request: Request, kind: type[T]) -> T:
    """Return the body decoded as `kind`. Raises BadMessage naming the wrong field."""
    return decode(await request.body(), kind)


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; when the client disconnects first, cancel it and raise ClientDisconnect.

    Returns only after `work` has ended, its clean-up included. The body must have been read before.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        disconnected.cancel()
        working.cancel()
        await asyncio.wait({working, disconnected})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
