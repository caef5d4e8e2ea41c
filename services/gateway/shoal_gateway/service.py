"""Run the gateway: its mirrors, its socket, and uvicorn inside the common main loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from shoal_common.config import is_loopback
from shoal_common.errors import Refused
from shoal_common.host.addresses import is_dual_stack
from shoal_common.host.listening import cannot_listen
from shoal_common.http.bounded_protocol import HttpRules
from shoal_common.http.bounds import HttpBounds
from shoal_common.http.server import HttpServer, http_config
from shoal_common.identity.api_key import ApiKeyFile
from shoal_common.identity.tls import server_context
from shoal_common.logs import StructuredLogger
from shoal_common.service import STOP_DEADLINE_S, ServiceContext
from shoal_gateway.app import build_app
from shoal_gateway.context import GatewayContext
from shoal_gateway.http_errors import respond_to
from shoal_gateway.settings import GatewaySettings, read_gateway_settings

log = StructuredLogger("gateway")

BOUNDS = HttpBounds(
    max_connections=768,  # all answers in flight, all clients that follow events, and as many as 192 others
    max_per_address=640,
    max_body_bytes=8 << 20,
    max_bodies_bytes=64 << 20,
)
_DRAIN_TIMEOUT_S = int(STOP_DEADLINE_S) - 2
"""For running requests after a stop; the rest of the deadline is for closing down."""


async def run(context: ServiceContext) -> None:
    """Serve HTTP until stopping, then let running requests finish."""
    settings = read_gateway_settings(context.config, context.environ)
    key_file = await asyncio.to_thread(ApiKeyFile, context.config.home)
    async with asyncio.TaskGroup() as tasks:
        live = await context.mirror(tasks, "live")
        spec = await context.mirror(tasks, "spec")
        state = await context.mirror(tasks, "state")
        gateway = GatewayContext(context, settings, tasks, live, spec, state)
        context.run_in_background(tasks, key_file.follow_forever())
        with _listening(context.config.bind, settings) as listener:
            await _serve(context, gateway, key_file, listener)


async def _serve(
    context: ServiceContext, gateway: GatewayContext, key_file: ApiKeyFile, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    await context.follow_interfaces(port)
    config, on_loopback = context.config, is_loopback(context.config.bind)
    tls = None
    if gateway.settings.speaks_tls and config.identity is not None:
        tls = await asyncio.to_thread(server_context, config.identity)
    elif not on_loopback:
        log.warning("no TLS beyond loopback: whoever can listen reads prompts, answers and the key", bind=config.bind)
    rules = HttpRules(BOUNDS, on_loopback, respond_to)
    http = http_config(build_app(gateway, key_file), rules, graceful_shutdown_s=_DRAIN_TIMEOUT_S, tls=tls)
    server = HttpServer(http, context.stopping, on_started=context.ready)
    await server.serve(sockets=[listener])


@contextmanager
def _listening(bind: str, settings: GatewaySettings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    # asyncio disables Nagle's algorithm only where the protocol is given; with it, answers take 40 ms longer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual_stack(bind))
        try:
            listener.bind((bind, settings.port))
        except OSError as e:
            remedy = "stop that program, or set SHOAL_GATEWAY_PORT to another"
            raise Refused(cannot_listen("the gateway", bind, settings.port, e, remedy)) from None
        listener.setblocking(False)
        yield listener
