"""An HTTP connection inside TLS, where its server has a context for that.

The connection counts as one from the moment that it is accepted, and the handshake is a part of the wait for the
first head: both bounds are those of `bounded_protocol.py`. asyncio's own TLS servers hide a connection until its
handshake has ended.
"""

from __future__ import annotations

import asyncio
import ssl

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shoal_common.logs import StructuredLogger

log = StructuredLogger("http")

_CLOSE_TIMEOUT_S = 5.0
"""How long a client may take to end the TLS session."""


class TlsHttpProtocol(HttpToolsProtocol):
    """An HTTP connection. Without a context it is a plain one."""

    tls: ssl.SSLContext | None = None
    socket_transport: asyncio.Transport
    """Writes to the socket; `transport` is above it inside TLS."""
    _handshake: asyncio.Task[None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Start the handshake, if there is one."""
        super().connection_made(transport)
        self.socket_transport = transport
        if self.tls is not None:
            transport.pause_reading()
            self._handshake = self.loop.create_task(self._shake_hands(self.tls, transport))

    async def _shake_hands(self, context: ssl.SSLContext, transport: asyncio.Transport) -> None:
        if transport.is_closing():  # evicted at once
            return
        client = _HandshakingClient(self)
        try:
            secured = await self.loop.start_tls(
                transport, client, context, server_side=True, ssl_shutdown_timeout=_CLOSE_TIMEOUT_S
            )
        except OSError as e:
            if isinstance(e, ssl.SSLError):
                address = self.client[0] if self.client else ""
                log.warning("TLS handshake failed", address=address, reason=e.reason or str(e))
            self.connection_lost(e)
            return
        if secured is None:  # closed meanwhile
            self.connection_lost(None)
            return
        self.use_transport(secured)
        secured.set_protocol(self)
        if client.received:
            self.data_received(bytes(client.received))

    def use_transport(self, transport: asyncio.Transport) -> None:
        """Read and write inside TLS from now on."""
        self.transport, self.flow, self.scheme = transport, FlowControl(transport), "https"

    @property
    def is_secured(self) -> bool:
        """Whether what is sent must be encrypted."""
        return self.transport is not self.socket_transport

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait until the client reads."""
        count = self.transport.get_write_buffer_size()
        return count + self.socket_transport.get_write_buffer_size() if self.is_secured else count


class _HandshakingClient(asyncio.Protocol):
    """Holds what a client sends with the end of its handshake, until the connection can answer inside TLS."""

    def __init__(self, connection: TlsHttpProtocol) -> None:
        self._connection = connection
        self.received = bytearray()

    def data_received(self, data: bytes) -> None:
        """Hold a first request."""
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        self._connection.connection_lost(exc)
