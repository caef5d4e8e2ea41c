"""The service: the API for peers (`blob_api.py`, `probe.py`), the hub's protocol (`hub_api.py`), and their port."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import msgspec
import uvicorn
from msgspec import structs
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal_common.bus import cluster_clock
from shoal_common.bus.keys import storage_key
from shoal_common.bus.kv_mirror import KvMirror
from shoal_common.config import Config, check_bind, is_loopback
from shoal_common.errors import ShoalError
from shoal_common.host.listening import holder_of, listen
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.http.bounded_protocol import HttpRules, protocol_of
from shoal_common.http.bounds import HttpBounds
from shoal_common.http.server import HttpServer, http_config
from shoal_common.identity.api_key import read_api_key
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_tokens import HEALTH_NAME, PeerTokens
from shoal_common.identity.tls import server_context
from shoal_common.logs import StructuredLogger
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.storage import StorageState
from shoal_common.service import ServiceContext
from shoal_common.settings.node import FileserverSettings, PortSettings
from shoal_common.settings.ports import CHOSEN_SECTION, fileserver_ports
from shoal_common.settings.values import read_settings
from shoal_common.settings_file import change_settings
from shoal_common.store.store_paths import StorePaths
from shoal_fileserver.blob_api import BlobApi, denied, error_response
from shoal_fileserver.http.bulk_protocol import BulkHttpProtocol
from shoal_fileserver.http.fast_path import FastPath
from shoal_fileserver.hub_api import HubApi
from shoal_fileserver.model_index import ModelIndex
from shoal_fileserver.probe import PATH as PROBE_PATH
from shoal_fileserver.probe import ProbeApi
from shoal_fileserver.send_history import SendHistory

log = StructuredLogger("fileserver")

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


class HubAccess(msgspec.Struct, frozen=True):
    """Who may use the hub's protocol here, and what it finds."""

    models: ModelIndex
    hub_key: str = ""
    """What clients send as HF_TOKEN; "" lets in whoever reaches a loopback address."""


def server_config(
    layout: StorePaths,
    tokens: PeerTokens,
    threads: Executor,
    hub: HubAccess | None = None,
    limiter: RateLimiter | None = None,
    bounds: HttpBounds = BOUNDS,
    loopback_only: bool = True,
    tls: ssl.SSLContext | None = None,
) -> uvicorn.Config:
    """Return the configuration of a server for one store; `threads` send files.

    With `hub` it speaks the hub's protocol too. With `tls` it speaks nothing else than TLS.
    """
    limiter = limiter or RateLimiter()
    sent = SendHistory(random.Random())
    fast_path = FastPath(layout, tokens, sent, limiter)
    blobs = BlobApi(layout, tokens, fast_path, sent, limiter)
    hub_routes = (
        HubApi(hub.hub_key, loopback_only, tokens, hub.models, blobs.respond_to_hub_client).routes if hub else []
    )
    return http_config(
        _application(blobs, tokens, hub_routes),
        HttpRules(bounds, loopback_only, _respond_to),
        protocol_of(BulkHttpProtocol, fast_path=fast_path, threads=threads),
        keep_alive_s=_KEEP_ALIVE_S,
        tls=tls,
    )


def _respond_to(error: ShoalError) -> Response:
    headers = {"Retry-After": str(_RETRY_AFTER_S)} if error.retryable else None
    return error_response(error.http_status, error.message, headers)


def _application(blobs: BlobApi, tokens: PeerTokens, hub_routes: list[BaseRoute]) -> ASGIApp:
    probe = ProbeApi(tokens)

    async def health(request: Request) -> Response:
        is_allowed = tokens.allows(HEALTH_NAME, request.headers, cluster_clock.now_s())
        return PlainTextResponse("ok\n") if is_allowed else denied()

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        response = denied() if tokens.are_required else error_response(404, "there is nothing at this path")
        await response(scope, receive, send)

    # No redirects: they would send the peer, and its credential, wherever its Host header says.
    others = Router(
        routes=[Route("/health", health, methods=["GET"]), *hub_routes], redirect_slashes=False, default=nothing
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(("/v1/blobs/", "/v1/leaves/")):
            await blobs(scope, receive, send)
        elif scope["path"] == PROBE_PATH:
            await probe(scope, receive, send)
        else:
            await others(scope, receive, send)

    return app


def bounds_for(max_connections: int) -> HttpBounds:
    """Return the bounds of a server of so many connections; half of them may come from one address."""
    return structs.replace(BOUNDS, max_connections=max_connections, max_per_address=(max_connections + 1) // 2)


def _listen(host: str, config: Config, environ: Mapping[str, str]) -> socket.socket:
    """Listen on the port that was set, or on the first free one, and keep that."""
    settings = read_settings(PortSettings, config.settings, environ)
    ports = fileserver_ports(settings, config.settings)
    listener = listen(
        host, ports, "the fileserver", "stop that program, or set SHOAL_FILESERVER_PORT to another port"
    )
    port = int(listener.getsockname()[1])
    if port != ports[0]:
        if ports[0]:
            log.warning(
                "the port is taken, another one was chosen", taken=ports[0], port=port, who=holder_of(ports[0])
            )
        # What others were told, like the URL of `shoal hub`, is still true after a restart.
        try:
            change_settings(config.home, {CHOSEN_SECTION: {"fileserver_port": port}}, lambda _: None)
        except (ShoalError, OSError) as e:
            log.warning("the chosen port cannot be kept", port=port, reason=str(e))
    return listener


async def run(context: ServiceContext) -> None:
    """Run the fileserver service."""
    config, identity = context.config, context.config.identity
    settings = read_settings(FileserverSettings, config.settings, context.environ)
    bind = settings.bind or config.bind
    check_bind("fileserver", bind, identity)
    loopback_only = is_loopback(bind)
    is_encrypted = identity is not None and not loopback_only and settings.encrypt_weights
    tls = await asyncio.to_thread(server_context, identity) if identity and is_encrypted else None
    listener = await asyncio.to_thread(_listen, bind, config, context.environ)
    limiter = RateLimiter()
    async with asyncio.TaskGroup() as tasks:
        # At once: while a restarted fileserver publishes no address, its peers turn to the hub (I9). The socket
        # already listens, and requests wait there for the mirrors.
        await context.follow_interfaces(listener.getsockname()[1], bind, is_encrypted)
        context.ready(NodeFacts(serves_peers=settings.serve_peers))
        models = await context.mirror(tasks, "state", "model.>")
        live = await context.mirror(tasks, "live", "*.fileserver")
        own_storage = await context.mirror(tasks, "state", storage_key(context.node))
        context.run_in_background(tasks, _follow_upload_limit(own_storage, context.node, limiter))
        peer_links = await asyncio.to_thread(PeerLinks, identity, not settings.encrypt_weights)
        secrets = await context.peer_secrets(tasks)
        threads = ThreadPoolExecutor(_SENDING_THREADS, "send")
        server = server_config(
            StorePaths(config.store),
            PeerTokens(context.node, secrets, settings.serve_peers),
            threads,
            HubAccess(
                ModelIndex(context.node, context.rpc, models, live, context.interfaces, peer_links),
                await asyncio.to_thread(read_api_key, config.home),
            ),
            limiter,
            bounds_for(settings.max_serving_connections),
            loopback_only,
            tls,
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
