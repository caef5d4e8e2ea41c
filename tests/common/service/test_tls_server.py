"""TLS around the common HTTP server: strangers who never end a handshake, or speak no TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvicorn

from shoal_common.http import bounded_protocol
from shoal_common.http.bounded_protocol import HttpRules
from shoal_common.http.bounds import HttpBounds
from shoal_common.http.server import http_config
from shoal_common.identity.certificates import node_host
from shoal_common.identity.tls import client_context, server_context
from tests.common.http_application import DEADLINE_S, respond
from tests.harness.member import make_member

BOUNDS = HttpBounds(max_connections=300, max_per_address=300, max_body_bytes=1 << 20, max_bodies_bytes=1 << 20)
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class TlsServer:
    """A running server and what its clients trust."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.port, self.context = port, context

    async def ask(self) -> bytes:
        """Return the response of a request over TLS."""
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=self.context, server_hostname=node_host("a")
            )
            writer.write(REQUEST)
            with suppress(ssl.SSLError):
                return await reader.read()
        raise AssertionError("no response")

    async def plain(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection without TLS."""
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def serving(home: Path) -> AsyncIterator[TlsServer]:
    """Run a server of node a."""
    identity = make_member(home, "a")
    rules = HttpRules(BOUNDS, False, lambda e: respond(e.http_status, e.code.encode()))
    server = uvicorn.Server(http_config(respond(200, b"ok"), rules, tls=server_context(identity)))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup([socket.create_server(("127.0.0.1", 0))])
    try:
        yield TlsServer(server.servers[0].sockets[0].getsockname()[1], client_context(identity.authority))
    finally:
        await server.shutdown()


async def test_a_client_of_the_cluster_is_answered(tmp_path: Path) -> None:
    async with serving(tmp_path / "home") as server:
        assert (await server.ask()).endswith(b"ok")


async def test_I7_a_handshake_that_never_ends_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_protocol, "HEAD_TIMEOUT_S", 0.2)
    async with serving(tmp_path / "home") as server:
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01", b"\x16" * 600, REQUEST):
            reader, writer = await server.plain()
            writer.write(sent)
            async with asyncio.timeout(DEADLINE_S):
                with suppress(ConnectionError):
                    assert b"HTTP/1.1 200" not in await reader.read()
            writer.close()


async def test_I7_silent_strangers_keep_no_client_out(tmp_path: Path) -> None:
    async with serving(tmp_path / "home") as server:
        silent = [await server.plain() for _ in range(BOUNDS.max_connections + 50)]
        assert (await server.ask()).endswith(b"ok"), "the oldest made room"
        for _, writer in silent:
            writer.close()
