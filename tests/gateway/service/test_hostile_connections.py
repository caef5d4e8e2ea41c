"""Strangers on raw sockets: what they send is bounded in memory and time, and honest clients are answered."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.gateway.running_gateway import RunningGateway, running_gateway
from tests.harness.nats import NatsServer

DEADLINE_S = 45.0
PIECE = b"".join(b"x-%04d: y\r\n" % n for n in range(5000))
BIG_BODY_BYTES = 7 << 20
BIG_BODIES = 24
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "


def port_of(gateway: RunningGateway) -> int:
    """Return the gateway's port."""
    return int(gateway.url.rpartition(":")[2])


def memory_bytes(gateway: RunningGateway) -> int:
    """Return the process's resident memory."""
    return int(psutil.Process(gateway.process.pid).memory_info().rss)


async def status_of(gateway: RunningGateway, request: bytes, host: str = "127.0.0.1") -> int:
    """Send a request on a connection of its own and return the response's status."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, port_of(gateway))
        try:
            writer.write(request)
            return int((await reader.readline()).split()[1])
        finally:
            writer.close()


async def health(gateway: RunningGateway) -> int:
    """Return the status of `/health`."""
    return await status_of(gateway, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")


async def send_all(writer: asyncio.StreamWriter, piece: bytes, count: int) -> None:
    """Send a piece so many times, or until the other end closes the connection."""
    with suppress(ConnectionError):
        for _ in range(count):
            writer.write(piece)
            await writer.drain()


async def test_I7_endless_headers_cost_no_memory(gateway: RunningGateway) -> None:
    before = memory_bytes(gateway)
    async with asyncio.timeout(DEADLINE_S):
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(gateway))
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        await send_all(writer, PIECE, 300)
    assert memory_bytes(gateway) - before < 16 << 20
    writer.close()
    assert await health(gateway) == 200


async def test_I7_half_sent_heads_do_not_silence_a_small_process(tmp_path: Path, own_nats: NatsServer) -> None:
    limited = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    with running_gateway(tmp_path / "home", own_nats, within=limited) as gateway:
        writers = []
        for _ in range(300):
            async with asyncio.timeout(DEADLINE_S):
                _, writer = await asyncio.open_connection("127.0.0.1", port_of(gateway))
            writer.write(b"GET /health HTTP/1.1\r\nHost: loc")
            writers.append(writer)
        for _ in range(3):
            assert await health(gateway) == 200
        assert len(gateway.log.read_text().splitlines()) < 50
        for writer in writers:
            writer.transport.abort()


async def test_I7_bodies_in_all_are_bounded_and_small_ones_still_pass(gateway: RunningGateway) -> None:
    before = memory_bytes(gateway)
    chat = CHAT + b"%d\r\n\r\n" % (BIG_BODY_BYTES + 1)
    statuses = []

    async def hold() -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(gateway))
        writer.write(chat)
        await send_all(writer, bytes(BIG_BODY_BYTES // 7), 7)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                statuses.append(int((await reader.readline()).split()[1]))
        return writer

    async with asyncio.timeout(DEADLINE_S):
        writers = [await hold() for _ in range(BIG_BODIES)]
    grown = memory_bytes(gateway) - before
    assert await status_of(gateway, CHAT + b"2\r\n\r\n[]") == 400
    for writer in writers:
        writer.transport.abort()
    assert grown < 110 << 20
    assert set(statuses) == {503} and 0 < len(statuses) < BIG_BODIES


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: user@localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example/@localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://user:word@localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /health HTTP/1.1\r\nHost: LOCALHOST:1\r\n\r\n", 200),
        (b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n", 200),
    ],
)
async def test_I12_one_host_that_is_this_machine(gateway: RunningGateway, head: bytes, status: int) -> None:
    assert await status_of(gateway, head) == status
