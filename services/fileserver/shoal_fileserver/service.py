"""The service: the API for peers (`blob_api.py`, `probe.py`), the hub's protocol (`hub_api.py`), and their port."""

from __future__ import annotations

import asyncio
import random
import socket
from concurrent.futures import Executor, ThreadPoolExecutor

import uvicorn
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal_common.bus.keys import storage_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.config import is_loopback
from shoal_common.errors import ShoalError, Unavailable
from shoal_common.host.addresses import is_dual_stack
from shoal_common.host.credentials import is_authorized
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.http.bounded_protocol import HttpRules, protocol_of
from shoal_common.http.bounds import HttpBounds
from shoal_common.http.server import HttpServer, http_config
from shoal_common.messages.storage import StorageState
from shoal_common.service import ServiceContext
from shoal_common.settings.node import PortSettings
from shoal_common.settings.values import read_settings
from shoal_common.store.store_paths import StorePaths
from shoal_fileserver.blob_api import BlobApi, error_response
from shoal_fileserver.http.bulk_protocol import BulkHttpProtocol
from shoal_fileserver.http.fast_path import FastPath
from shoal_fileserver.hub_api import HubApi
from shoal_fileserver.model_index import ModelIndex
from shoal_fileserver.probe import PATH as PROBE_PATH
from shoal_fileserver.probe import ProbeApi
from shoal_fileserver.send_history import SendHistory

BOUNDS = HttpBounds(
    max_connections=256,
    max_per_address=128,  # several nodes may share an address, and each of their fetchers has up to 32 connections
    max_body_bytes=256 << 10,  # the bitmap of a blob of 2 TiB
    max_bodies_bytes=16 << 20,
    files_per_connection=2,
)
_KEEP_ALIVE_S = 30
_RETRY_AFTER_S = 2
_SENDING_THREADS = 8


def server_config(
    layout: StorePaths,
    node: str,
    secret: str,
    threads: Executor,
    model_index: ModelIndex | None = None,
    limiter: RateLimiter | None = None,
    bounds: HttpBounds = BOUNDS,
    loopback_only: bool = True,
) -> uvicorn.Config:
    """Return the configuration of a server for one store; `threads` send files.

    With a model index it speaks the hub's protocol too.
    """
    limiter = limiter or RateLimiter()
    sent = SendHistory(random.Random())
    fast_path = FastPath(layout, node, secret, sent, limiter)
    return http_config(
        _application(
            BlobApi(layout, node, secret, fast_path, sent, limiter), ProbeApi(node, secret), secret, model_index
        ),
        HttpRules(bounds, loopback_only, _respond_to),
        protocol_of(BulkHttpProtocol, fast_path=fast_path, threads=threads),
        keep_alive_s=_KEEP_ALIVE_S,
    )


def _respond_to(error: ShoalError) -> Response:
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if error.retryable else None
    return error_response(error.http_status, error.message, headers)


def _application(blobs: BlobApi, probe: ProbeApi, secret: str, model_index: ModelIndex | None) -> ASGIApp:

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def denied(scope: Scope, receive: Receive, send: Send) -> None:
        await error_response(401, "send a token for this blob of this node")(scope, receive, send)

    hub_routes = HubApi(secret, model_index, blobs.respond_to_hub_client).routes if model_index else []
    # No redirects: they would send the peer, and its credential, wherever its Host header says.
    peers = Router(routes=[Route("/health", health, methods=["GET"]), *hub_routes], redirect_slashes=False)
    hub_app = Router(routes=hub_routes, redirect_slashes=False, default=denied)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(("/v1/blobs/", "/v1/leaves/")):
            await blobs(scope, receive, send)
        elif scope["path"] == PROBE_PATH:
            await probe(scope, receive, send)
        elif is_authorized(secret, "blobs", Headers(scope=scope)):
            await peers(scope, receive, send)
        else:
            await hub_app(scope, receive, send)

    return app


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, dualstack_ipv6=is_dual_stack(host))
    except OSError as e:
        raise Unavailable(
            f"the fileserver cannot listen on {host} port {port}: {e.strerror}; stop the program that does, or set "
            "SHOAL_FILESERVER_PORT to another port"
        ) from None


async def run(context: ServiceContext) -> None:
    """Run the fileserver service."""
    config = context.config
    listener = _listen(config.bind, read_settings(PortSettings, {}, context.environ).fileserver_port)
    limiter = RateLimiter()
    async with asyncio.TaskGroup() as tasks:
        # At once: while a restarted fileserver publishes no address, its peers turn to the hub (I9). The socket
        # already listens, and requests wait there for the mirrors.
        await context.follow_interfaces(listener.getsockname()[1])
        context.ready()
        models = await context.mirror(tasks, "state", "model.>")
        live = await context.mirror(tasks, "live", "*.fileserver")
        own_storage = await context.mirror(tasks, "state", storage_key(context.node))
        context.run_in_background(tasks, _follow_upload_limit(own_storage, context.node, limiter))
        model_index = ModelIndex(context.node, context.rpc, models, live, context.interfaces)
        threads = ThreadPoolExecutor(_SENDING_THREADS, "send")
        layout = StorePaths(config.store)
        server = server_config(
            layout,
            context.node,
            config.secret,
            threads,
            model_index,
            limiter,
            loopback_only=is_loopback(config.bind),
        )
        try:
            await HttpServer(server, context.stopping).serve(sockets=[listener])
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


async def _follow_upload_limit(own_storage: KvMirror, node: str, limiter: RateLimiter) -> None:
    """Apply the node's `max_upload_bytes_per_s`, as its storage publishes it."""
    seen = -1
    while True:
        seen = await own_storage.wait_changed(seen)
        if state := own_storage.get(storage_key(node), StorageState):
            limiter.set_rate(state.max_upload_bytes_per_s)
