"""Links between stages: a stranger's connections keep no neighbour out, and do not fill the log."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import pytest

from shoal_inference.stage.errors import LinkError
from shoal_inference.stage.ring import connection
from shoal_inference.stage.ring.frames import MAX_PAYLOAD_BYTES, Frame, ring_tag
from shoal_inference.stage.ring.handshake import RingPlace
from shoal_inference.stage.ring.ring import MAX_HANDSHAKES_PER_ADDRESS, Predecessor, Successor

RING = ring_tag("i1", 3)
FRAME_TIMEOUT_S = 10.0
IDLE_CONNECTIONS = 64
LINKS_WITHIN_S = 1.0


def place(rank: int) -> RingPlace:
    return RingPlace(instance="i1", epoch=3, rank=rank, stages=2, secret=b"the ring's secret")


class Listening:
    """A stage that accepts its predecessor, and the port at which it does."""

    def __init__(self) -> None:
        self.linked = asyncio.Event()
        self.predecessor = Predecessor(
            place(1), RING, FRAME_TIMEOUT_S, MAX_PAYLOAD_BYTES, self.linked.set, self._down, self._ignore
        )
        self.listener = self.predecessor.listen("127.0.0.1")
        self.port: int = self.listener.getsockname()[1]

    def _down(self, _: LinkError) -> None:
        self.linked.clear()

    async def _ignore(self, _: Frame) -> None:
        pass


@asynccontextmanager
async def listening() -> AsyncIterator[Listening]:
    stage = Listening()
    with stage.listener:
        running = asyncio.create_task(stage.predecessor.run(stage.listener))
        try:
            yield stage
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def linking(stage: Listening) -> AsyncIterator[Successor]:
    successor = Successor(place(0), RING, FRAME_TIMEOUT_S, lambda: None, lambda _: None)
    successor.target("127.0.0.1", stage.port)
    running = asyncio.create_task(successor.run())
    try:
        yield successor
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def idle(port: int, count: int) -> list[socket.socket]:
    """Connect and say nothing."""
    loop, sockets = asyncio.get_running_loop(), []
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        sockets.append(sock)
    return sockets


async def test_idle_connections_do_not_keep_a_ring_from_linking() -> None:
    async with listening() as stage:
        sockets = await idle(stage.port, IDLE_CONNECTIONS)
        began_s = monotonic()
        async with linking(stage), asyncio.timeout(FRAME_TIMEOUT_S * IDLE_CONNECTIONS):
            await stage.linked.wait()
        took_s = monotonic() - began_s
        for sock in sockets:
            sock.close()
    assert took_s < LINKS_WITHIN_S, f"linked after {took_s:.1f} s"


async def test_the_oldest_unproven_connection_makes_room() -> None:
    loop = asyncio.get_running_loop()
    async with listening() as stage:
        sockets = await idle(stage.port, MAX_HANDSHAKES_PER_ADDRESS + 1)
        async with asyncio.timeout(connection.HANDSHAKE_TIMEOUT_S):
            while await loop.sock_recv(sockets[0], 4096):
                pass  # the challenge, then the end
        assert stage.predecessor.refused == 1
        assert await loop.sock_recv(sockets[1], 4096)
        for sock in sockets:
            sock.close()


async def test_a_silent_stranger_is_left_after_the_handshakes_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT_S", 0.05)
    loop = asyncio.get_running_loop()
    async with listening() as stage:
        (sock,) = await idle(stage.port, 1)
        async with asyncio.timeout(FRAME_TIMEOUT_S / 2):
            while await loop.sock_recv(sock, 4096):
                pass
        sock.close()


async def test_rejections_are_one_log_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as stage:
        for sock in await idle(stage.port, MAX_HANDSHAKES_PER_ADDRESS * 3):
            sock.close()
        async with linking(stage), asyncio.timeout(FRAME_TIMEOUT_S):
            await stage.linked.wait()
        assert stage.predecessor.refused >= MAX_HANDSHAKES_PER_ADDRESS * 2
    assert [record.getMessage() for record in caplog.records].count("connection rejected") == 1
