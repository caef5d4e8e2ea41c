"""One connection between neighbours: socket options, TLS, the handshake, frames, and a deadline on each.

Foreign exceptions (OSError, IncompleteReadError, TimeoutError) become LinkError here and nowhere else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import msgspec

from shoal_inference.stage.errors import BadFrame, LinkClosed, LinkError
from shoal_inference.stage.ring import handshake
from shoal_inference.stage.ring.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, Frame, decode_header, encode_header

READ_BUFFER_BYTES = 4 * 1024 * 1024
WRITE_BUFFER_BYTES = 8 * 1024 * 1024
"""Unsent bytes beyond which `send` waits for the peer. Each request adds at most its window of frames."""
HANDSHAKE_TIMEOUT_S = 3.0
"""A neighbour proves itself within a round trip; a stranger holds a connection no longer than this."""
KEEPALIVE_IDLE_S = 15
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3


class RingAddress(msgspec.Struct, frozen=True):
    """Where a stage listens, and the name that its certificate has there; "" where it speaks no TLS."""

    host: str
    port: int
    server_hostname: str = ""


def tune(sock: socket.socket) -> None:
    """No delay for small frames; a peer that vanished without a word is noticed in about 30 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)


@asynccontextmanager
async def _mapped(doing: str, deadline_s: float | None) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except asyncio.IncompleteReadError as error:
        where = " in the middle of a message" if error.partial else ""
        raise LinkClosed(f"the peer closed the connection{where} while {doing}") from error
    except TimeoutError as error:
        raise LinkClosed(f"{doing} took longer than {deadline_s} s") from error
    except OSError as error:
        raise LinkClosed(f"{doing}: {error}") from error


class Connection:
    """Frames in and out of one authenticated connection."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        ring: bytes,
        frame_timeout_s: float,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._ring = ring
        self._frame_timeout_s = frame_timeout_s
        self._max_payload_bytes = max_payload_bytes
        self._broken: LinkError | None = None
        writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    async def read(self) -> Frame:
        """The next frame. Waits for its first byte as long as it takes, for the rest until the frame deadline."""
        try:
            async with _mapped("waiting for a frame", None):
                first = await self._reader.readexactly(1)
            async with _mapped("reading a frame", self._frame_timeout_s):
                header = decode_header(
                    first + await self._reader.readexactly(HEADER_BYTES - 1),
                    max_payload_bytes=self._max_payload_bytes,
                )
                if header.ring != self._ring:
                    raise BadFrame("the frame belongs to another instance or epoch")
                meta = await self._reader.readexactly(header.meta_bytes)
                payload = await self._reader.readexactly(header.payload_bytes)
        except LinkError as error:
            raise self._broken or error from None
        return Frame(header, meta, payload)

    def post(self, frame: Frame) -> None:
        """Queue a small frame (END, FAIL, TOKEN) without waiting: requests bound how many there can be."""
        if self._broken is not None:
            raise self._broken
        self._writer.write(encode_header(frame.header) + frame.meta)
        if frame.payload:
            self._writer.write(frame.payload)

    async def send(self, frame: Frame) -> None:
        """Queue a frame and wait until the buffer is below its bound; the frame deadline breaks the connection."""
        self.post(frame)
        try:
            async with _mapped("sending a frame", self._frame_timeout_s):
                await self._writer.drain()
        except LinkError as error:
            self.break_off(error)
            raise self._broken or error from None

    async def wait_closed(self) -> LinkError:
        """For a connection that is only written to: how it ended. A byte from the peer ends it too."""
        try:
            async with _mapped("waiting", None):
                stray = await self._reader.read(1)
            found: LinkError = BadFrame("it spoke against the ring's direction") if stray else LinkClosed("closed")
        except LinkError as error:
            found = error
        return self._broken or found

    def break_off(self, reason: LinkError) -> None:
        """Close at once, unsent bytes and all; whoever reads or writes gets `reason`."""
        if self._broken is None:
            self._broken = reason
        self._writer.transport.abort()


async def _open(sock: socket.socket, tls: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_BUFFER_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    try:
        tune(sock)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=tls)
    except BaseException:
        sock.close()
        raise
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def accept(
    sock: socket.socket,
    place: handshake.RingPlace,
    ring: bytes,
    timeout_s: float,
    max_payload_bytes: int,
    tls: ssl.SSLContext | None = None,
) -> Connection:
    """The acceptor's half of the handshake on a connected socket; closes it and raises LinkError if it fails.

    `timeout_s` is the deadline of frames; that of the handshake, TLS included, is HANDSHAKE_TIMEOUT_S if that is
    shorter.
    """
    began_s, deadline_s = monotonic(), min(timeout_s, HANDSHAKE_TIMEOUT_S)
    async with _mapped("shaking hands", deadline_s):
        reader, writer = await _open(sock, tls)
    try:
        async with _mapped("shaking hands", max(deadline_s - (monotonic() - began_s), 0)):
            nonce = os.urandom(handshake.NONCE_BYTES)
            writer.write(handshake.challenge(nonce))
            size = int.from_bytes(await reader.readexactly(2), "little")
            if size > handshake.MAX_HELLO_BYTES:
                raise BadFrame(f"a hello of {size} bytes exceeds {handshake.MAX_HELLO_BYTES}")
            peer_nonce = handshake.check_hello(place, nonce, await reader.readexactly(size))
            writer.write(handshake.welcome(place, nonce, peer_nonce))
            await writer.drain()
    except BaseException:
        writer.transport.abort()
        raise
    return Connection(reader, writer, ring=ring, frame_timeout_s=timeout_s, max_payload_bytes=max_payload_bytes)


async def connect(
    address: RingAddress,
    place: handshake.RingPlace,
    ring: bytes,
    timeout_s: float,
    tls: ssl.SSLContext | None = None,
) -> Connection:
    """Connect to the next stage and prove membership, both ways; raises LinkError."""
    if address.server_hostname and tls is None:
        raise LinkClosed("the next stage speaks TLS, and this node has no identity")
    async with _mapped(f"connecting to {address.host}:{address.port}", timeout_s):
        reader, writer = await asyncio.open_connection(
            address.host,
            address.port,
            limit=READ_BUFFER_BYTES,
            ssl=tls if address.server_hostname else None,
            server_hostname=address.server_hostname or None,
        )
    try:
        sock: socket.socket = writer.get_extra_info("socket")
        async with _mapped("shaking hands", timeout_s):
            tune(sock)
            peer_nonce = handshake.read_challenge(await reader.readexactly(handshake.CHALLENGE_BYTES))
            nonce = os.urandom(handshake.NONCE_BYTES)
            writer.write(handshake.hello(place, peer_nonce, nonce))
            proof = await reader.readexactly(handshake.PROOF_BYTES)
            handshake.check_welcome(place, peer_nonce, nonce, proof)
    except BaseException:
        writer.transport.abort()
        raise
    return Connection(reader, writer, ring=ring, frame_timeout_s=timeout_s)
