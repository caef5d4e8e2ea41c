"""Links between stages: a stranger's connections keep no neighbour out, and do not fill the log."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import pytest
from msgspec import structs

from shoal_common.identity.certificates import node_host
from shoal_common.identity.tls import client_context, server_context
from shoal_inference.stage.errors import LinkError
from shoal_inference.stage.ring import connection
from shoal_inference.stage.ring.connection import RingAddress
from shoal_inference.stage.ring.frames import MAX_PAYLOAD_BYTES, Dtype, Frame, Kind, make_frame, ring_tag
from shoal_inference.stage.ring.handshake import RingPlace
from shoal_inference.stage.ring.ring import MAX_HANDSHAKES_PER_ADDRESS, Predecessor, Successor
from tests.harness.identities import Authority
from tests.harness.waiting import eventually

RING = ring_tag("i1", 3)
FRAME_TIMEOUT_S = 10.0
IDLE_CONNECTIONS = 64
LINKS_WITHIN_S = 1.0


def place(rank: int) -> RingPlace:
    secret = b"the secret of two nodes"
    return RingPlace(instance="i1", epoch=3, rank=rank, stages=2, successor_secret=secret, predecessor_secret=secret)


class Listening:
    """A stage that accepts its predecessor, and the port at which it does."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.linked = asyncio.Event()
        self.received: asyncio.Queue[Frame] = asyncio.Queue()
        self.predecessor = Predecessor(
            place(1), RING, FRAME_TIMEOUT_S, MAX_PAYLOAD_BYTES, self.linked.set, self._down, self._receive, tls
        )
        self.listener = self.predecessor.listen("127.0.0.1")
        self.port: int = self.listener.getsockname()[1]

    def _down(self, _: LinkError) -> None:
        self.linked.clear()

    async def _receive(self, frame: Frame) -> None:
        self.received.put_nowait(frame)


@asynccontextmanager
async def listening(tls: ssl.SSLContext | None = None) -> AsyncIterator[Listening]:
    stage = Listening(tls)
    with stage.listener:
        running = asyncio.create_task(stage.predecessor.run(stage.listener))
        try:
            yield stage
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def linking(
    stage: Listening, own_place: RingPlace | None = None, tls: ssl.SSLContext | None = None, node: str = ""
) -> AsyncIterator[Successor]:
    """Keep connecting to a stage: inside TLS to that node, if there is one."""
    successor = Successor(own_place or place(0), RING, FRAME_TIMEOUT_S, lambda: None, lambda _: None, tls=tls)
    successor.target(RingAddress("127.0.0.1", stage.port, node_host(node) if node else ""))
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


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def wait_refused(stage: Listening) -> None:
    """Return once a stage has refused a connection."""

    async def has_refused() -> bool:
        return stage.predecessor.refused > 0

    await eventually(has_refused, "a connection is refused")


async def wait_up(successor: Successor) -> None:
    """Return once a link can be sent on."""

    async def is_up() -> bool:
        return successor.is_up

    await eventually(is_up, "the link is up")


async def test_hidden_states_of_any_size_pass_inside_tls(authority: Authority) -> None:
    async with (
        listening(server_context(authority.node("b"))) as stage,
        linking(stage, None, client_context(authority.certificate), "b") as successor,
    ):
        await wait_up(successor)
        async with asyncio.timeout(FRAME_TIMEOUT_S):
            for tokens in (1, 5000):
                payload = bytes(range(256)) * (tokens * 16)
                frame = make_frame(
                    Kind.HIDDEN, RING, bytes(16), seq=1, dtype=Dtype.BF16, shape=(1, tokens, 2048), payload=payload
                )
                await successor.send(frame)
                assert await stage.received.get() == frame


async def test_I12_a_member_that_is_no_neighbour_cannot_link(authority: Authority) -> None:
    stranger = structs.replace(place(0), successor_secret=b"the secret of b and c")
    async with (
        listening(server_context(authority.node("b"))) as stage,
        linking(stage, stranger, client_context(authority.certificate), "b"),
    ):
        await wait_refused(stage)
        assert not stage.linked.is_set()


async def test_I12_another_member_at_the_address_is_sent_no_hello(authority: Authority) -> None:
    # It even knows the secret: what it lacks is the certificate.
    async with (
        listening(server_context(authority.node("c"))) as stage,
        linking(stage, None, client_context(authority.certificate), "b") as successor,
    ):
        await wait_refused(stage)
        assert not stage.linked.is_set() and not successor.is_up


async def test_I12_an_encrypted_port_takes_no_plain_neighbour(authority: Authority) -> None:
    async with listening(server_context(authority.node("b"))) as stage, linking(stage):
        await wait_refused(stage)
        assert not stage.linked.is_set()


async def test_a_silent_stranger_is_left_before_it_shakes_hands_too(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT_S", 0.05)
    async with listening(server_context(authority.node("b"))) as stage:
        (sock,) = await idle(stage.port, 1)
        async with asyncio.timeout(FRAME_TIMEOUT_S / 2):
            assert await asyncio.get_running_loop().sock_recv(sock, 4096) == b""
        sock.close()
