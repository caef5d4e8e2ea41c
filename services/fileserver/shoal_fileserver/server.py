"""`GET /v1/blobs/<sha256>`, with single ranges. Content is named by hash only, so no path comes from outside (I10).

Only what shows that storage has hashed it is served (I1, `shoal_common/proof.py`): a person may have put another file
in a blob's place, or be putting one there now. Without the cluster's credential every path answers the same 401
(I12), but for the hub's protocol (`hub.py`), which has a credential of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from io import FileIO

import uvicorn
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal_common.blobs import open_blob
from shoal_common.credentials import allowed
from shoal_common.errors import BadInput, BadName, Unavailable
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.names import check_blob
from shoal_common.reach import takes_both
from shoal_common.service import Context
from shoal_fileserver.catalog import Catalog
from shoal_fileserver.connections import BoundedHttp
from shoal_fileserver.hub import HubProtocol
from shoal_fileserver.ranges import Part, Unsatisfiable, parse_range

log = Log("fileserver")

_TYPE = "application/octet-stream"
_CHUNK_BYTES = 1 << 20
_KEEP_ALIVE_S = 30
_STOP_S = 5


def make_app(layout: Layout, secret: str, catalog: Catalog | None = None) -> ASGIApp:
    """The HTTP application over one store; with a catalog, in the hub's protocol too, over what its nodes have."""

    async def blob(request: Request) -> Response:
        try:
            return await serve(request, check_blob(request.path_params["sha256"]), {})
        except BadName as e:
            return _problem(400, e.message)

    async def serve(request: Request, sha256: str, headers: Mapping[str, str]) -> Response:
        try:
            file = await asyncio.to_thread(open_blob, layout, sha256)
        except FileNotFoundError:
            return _problem(404, "this node does not hold that blob, verified")
        except OSError as e:
            log.warning("a blob cannot be opened", blob=sha256, why=str(e))
            return _problem(503, "this node cannot read that blob now")
        # Open, it stays readable to its end even if the blob is deleted meanwhile; it is closed with the response.
        return _answer(request, file, {"ETag": f'"{sha256}"', **headers})

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def denied(scope: Scope, receive: Receive, send: Send) -> None:
        await _problem(401, "show the cluster's credential for blobs")(scope, receive, send)

    hub_routes = HubProtocol(secret, catalog, serve).routes if catalog else []
    peers = Router(
        routes=[
            Route("/v1/blobs/{sha256}", blob, methods=["GET", "HEAD"]),
            Route("/health", health, methods=["GET"]),
            *hub_routes,
        ],
        # A redirection would send the peer, and its credential, wherever its Host header says.
        redirect_slashes=False,
    )
    strangers = Router(routes=hub_routes, redirect_slashes=False, default=denied)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        answer = peers if allowed(secret, "blobs", Headers(scope=scope)) else strangers
        await answer(scope, receive, send)

    return guarded


def _answer(request: Request, file: FileIO, named: Mapping[str, str]) -> Response:
    size, etag = os.fstat(file.fileno()).st_size, named["ETag"]
    headers = {**named, "Accept-Ranges": "bytes", "Cache-Control": "immutable, max-age=31536000"}
    # Several Range headers are several ranges; a part of another version than ours is no part of this blob.
    header = ",".join(request.headers.getlist("range")) or None
    asked = parse_range(header if request.headers.get("if-range", etag) == etag else None, size)
    if isinstance(asked, Unsatisfiable):
        file.close()
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    start, end, status = 0, size, 200
    if isinstance(asked, Part):
        start, end, status = asked.start, asked.end, 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        file.close()
        return Response(status_code=status, headers=headers, media_type=_TYPE)
    return StreamingResponse(_read(file, start, end), status, headers, media_type=_TYPE)


async def _read(file: FileIO, start: int, end: int) -> AsyncIterator[bytes]:
    with file:
        while start < end:
            chunk = await asyncio.to_thread(os.pread, file.fileno(), min(_CHUNK_BYTES, end - start), start)
            if not chunk:
                return  # shorter than it was: the missing Content-Length tells the peer
            start += len(chunk)
            yield chunk


def _problem(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


def _listen(host: str, environ: Mapping[str, str]) -> socket.socket:
    """The port that peers ask: SHOAL_FILESERVER_PORT, or any free one."""
    asked = environ.get("SHOAL_FILESERVER_PORT") or "0"
    if not (asked.isascii() and asked.isdigit() and int(asked) < 1 << 16):
        raise BadInput(f"SHOAL_FILESERVER_PORT is {asked!r}: a port from 1 to 65535 is expected, or 0 for any")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(asked)), family=family, dualstack_ipv6=takes_both(host))
    except OSError as e:
        raise Unavailable(
            f"the fileserver cannot listen on {host} port {asked}: {e.strerror}; stop what does, or set "
            "SHOAL_FILESERVER_PORT to another port"
        ) from None


async def run(context: Context) -> None:
    """The fileserver service."""
    config = context.config
    listener = _listen(config.bind, context.environ)
    # What a hostile peer can provoke is not worth a line each; what went wrong here is.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    async with asyncio.TaskGroup() as tasks:
        # At once: while a fileserver that was restarted says no address, its peers turn to the hub (I9). The socket
        # listens already, and who comes waits there for the views.
        await context.follow_interfaces(listener.getsockname()[1])
        context.ready()
        models = await context.view(tasks, "state", "model.>")
        live = await context.view(tasks, "live")
        catalog = Catalog(context.node, context.ask, models, live, context.interfaces)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(Layout(config.store), config.secret, catalog),
                http=BoundedHttp,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_STOP_S,
            )
        )
        tasks.create_task(_stop(context, server))
        # `_serve` is `serve` without its signal handlers: signals are the main loop's.
        await server._serve(sockets=[listener])


async def _stop(context: Context, server: uvicorn.Server) -> None:
    await context.stopping.wait()
    server.should_exit = True
