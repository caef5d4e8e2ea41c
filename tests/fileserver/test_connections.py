"""Connections that say or take nothing are closed in time. The server runs here, with short deadlines."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from shoal_common.layout import Layout
from shoal_common.proof import prove
from shoal_fileserver import connections, crowd
from shoal_fileserver.server import make_app

SHORT_S = 0.3
ASK = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving_here(store: Path) -> AsyncIterator[int]:
    """The port of a server in this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(Layout(store), "here", "")
    settings = uvicorn.Config(app, http=connections.BoundedHttp, ws="none", log_config=None, lifespan="off")
    settings.timeout_graceful_shutdown = 1
    server = uvicorn.Server(settings)
    running = asyncio.create_task(server._serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def closed(reader: asyncio.StreamReader) -> None:
    """Return once the server has closed a connection."""
    async with asyncio.timeout(45):
        try:
            while await reader.read(1 << 16):
                pass
        except ConnectionResetError:
            return


@pytest.mark.parametrize("said", [b"", b"GET /v1/blobs/abc HTT", b"\r\n", ASK + b"GET /hea", ASK + b"\r\n\r\n"])
async def test_I7_a_request_that_never_comes_whole_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(connections, "HEAD_DEADLINE_S", SHORT_S)
    async with serving_here(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if said.startswith(ASK):
            writer.write(ASK)
            await reader.readuntil(b"ok\n")
        writer.write(said.removeprefix(ASK))
        await closed(reader)
        writer.close()


async def test_I7_a_reader_that_takes_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "DRAIN_S", SHORT_S)
    path = Layout(tmp_path).blob("ab" * 32)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(32 << 20))
    prove(path.name, path)
    async with serving_here(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(f"GET /v1/blobs/{path.name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        transport = writer.transport

        async def cut() -> None:
            # Reading is paused by the reader's limit; a write shows that the other end has gone.
            while not transport.is_closing():
                writer.write(b"\r\n")
                await asyncio.sleep(SHORT_S / 10)

        await asyncio.wait_for(cut(), 45)


async def test_a_slow_reader_is_not_cut_off_while_it_takes_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_DEADLINE_S", SHORT_S)
    data = bytes(24 << 20)
    path = Layout(tmp_path).blob("ab" * 32)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    prove(path.name, path)
    async with serving_here(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(f"GET /v1/blobs/{path.name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(2 * SHORT_S)  # longer than a head may take: a transfer is no head
        assert await asyncio.wait_for(reader.readexactly(len(data)), 45) == data
        writer.close()


async def test_I7_the_newcomer_is_served_and_the_longest_idle_one_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "MAX_CONNECTIONS", 5)
    async with serving_here(tmp_path) as port:
        idle = []
        for _ in range(8):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ASK)
            await reader.readuntil(b"ok\n")
            idle.append((reader, writer))
        for reader, _ in idle[:3]:
            await closed(reader)
        for reader, writer in idle[3:]:
            writer.write(ASK)
            await asyncio.wait_for(reader.readuntil(b"ok\n"), 10)
            writer.close()
