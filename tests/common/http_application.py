"""A small HTTP application behind the common protocol, and a client of plain sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import uvicorn

from shoal_common.errors import ShoalError
from shoal_common.http.bounded_protocol import HttpRules
from shoal_common.http.bounds import HttpBounds
from shoal_common.http.server import http_config
from tests.harness.waiting import eventually

DEADLINE_S = 45.0
BODY_BYTES = 1 << 20
BOUNDS = HttpBounds(
    max_connections=32, max_per_address=32, max_body_bytes=BODY_BYTES, max_bodies_bytes=2 * BODY_BYTES
)
STREAM_BYTES = 4 << 20
LARGE_BYTES = 16 << 20


class Server:
    """A running server, and what holds its answers back."""

    def __init__(self, server: uvicorn.Server, rules: HttpRules, released: asyncio.Event) -> None:
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.rules, self.released, self._state = rules, released, server.server_state

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 16)

    async def bodies_bytes_are(self, expected: int) -> None:
        """Return once so many bytes of bodies count."""

        async def are() -> bool:
            return self.rules.bodies_bytes == expected

        await eventually(are, f"{expected} bytes of bodies count")

    async def has_connections(self, expected: int) -> None:
        """Return once so many connections are open."""

        async def has() -> bool:
            return len(self._state.connections) == expected

        await eventually(has, f"{expected} connections are open")


def configured(released: asyncio.Event) -> tuple[uvicorn.Config, HttpRules]:
    """Return an application with a few paths: read the body, ignore it, respond at length, begin to respond, wait."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        text, path = b"", scope["path"]
        if path == "/wait":
            await released.wait()
        if path in ("/stream", "/begin"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(STREAM_BYTES // 65536 if path == "/stream" else 0):
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            while (await receive())["type"] != "http.disconnect" and not released.is_set():
                pass
            await send({"type": "http.response.body"})
            return
        if path == "/read":
            count, more = 0, True
            while more:
                message = await receive()
                count, more = count + len(message.get("body", b"")), message.get("more_body", False)
            await released.wait()
            text = b"%d" % count
        if path == "/large":
            text = bytes(LARGE_BYTES)
        await respond(200, text)(scope, receive, send)

    rules = HttpRules(BOUNDS, True, lambda error: respond(error.http_status, error.message.encode()))

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except ShoalError as e:
            await rules.respond(e)(scope, receive, send)

    config = http_config(outer, rules, graceful_shutdown_s=1)
    config.load()
    return config, rules


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    """Run the application."""
    released = asyncio.Event()
    config, rules = configured(released)
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([socket.create_server(("127.0.0.1", 0))])
    try:
        yield Server(server, rules, released)
    finally:
        released.set()
        await server.shutdown()


def respond(status: int, text: bytes) -> Any:
    """Return an ASGI application with one response."""

    async def responding(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    return responding


def request(path: str, length: int | None = None, *more: str) -> bytes:
    """Return a request's head."""
    lines = [f"{'GET' if length is None else 'POST'} {path} HTTP/1.1", "Host: localhost", *more]
    return "\r\n".join([*lines, *([] if length is None else [f"Content-Length: {length}"]), "", ""]).encode()


async def reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return the next response's status and text."""
    async with asyncio.timeout(DEADLINE_S):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return int(head.split()[1]), await reader.readexactly(length)


async def closed(reader: asyncio.StreamReader) -> bytes:
    """Return what still arrives before the server closes the connection."""
    data = bytearray()
    async with asyncio.timeout(DEADLINE_S):
        with suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                data += piece
    return bytes(data)
