"""TLS around an HTTP connection. asyncio's own would let handshakes wait for a minute, and any number of them."""

from __future__ import annotations

import asyncio
import ssl
from asyncio import AbstractEventLoop, BaseTransport, Transport
from asyncio.sslproto import SSLProtocol
from typing import Any, cast

from shoal_common.http.bounded_protocol import BoundedHttpProtocol

HANDSHAKE_TIMEOUT_S = 10
_SHUTDOWN_TIMEOUT_S = 5
_TLS_HANDSHAKE = 0x16
"""First byte of what a TLS client sends."""
_PLAIN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: text/plain\r\n\r\n"
    b"This port speaks TLS: write https:// instead of http://\n"
)


class Handshakes:
    """The connections of one server whose handshake has not ended, the oldest first. The oldest makes room."""

    def __init__(self, max_count: int) -> None:
        self.max_count = max_count
        self._open: dict[TlsConnection, Transport] = {}

    def add(self, connection: TlsConnection, transport: Transport) -> None:
        """Count a new connection."""
        if self._open and len(self._open) >= self.max_count:
            self._open.pop(next(iter(self._open))).abort()
        self._open[connection] = transport

    def end(self, connection: TlsConnection) -> None:
        """Count it no more."""
        self._open.pop(connection, None)


class TlsConnection(SSLProtocol):
    """A connection that passes to an HTTP protocol once its handshake has ended."""

    def __init__(
        self, loop: AbstractEventLoop, http: BoundedHttpProtocol, context: ssl.SSLContext, handshakes: Handshakes
    ) -> None:
        super().__init__(
            loop,
            http,
            context,
            cast(asyncio.Future[Any], None),  # nobody waits for it, as for asyncio's own servers
            server_side=True,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            ssl_shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
        )
        self._handshakes, self._http = handshakes, http
        self._raw: Transport | None = None
        self._buffer = memoryview(b"")
        self._has_begun = False

    def connection_made(self, transport: BaseTransport) -> None:
        """Begin the handshake."""
        self._raw = cast(Transport, transport)
        self._handshakes.add(self, self._raw)
        super().connection_made(transport)

    def get_buffer(self, n: int) -> memoryview:
        """Return where the next bytes go."""
        self._buffer = memoryview(super().get_buffer(n))
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes of the handshake, or of what is encrypted."""
        if not self._has_begun and nbytes and self._raw is not None:
            self._has_begun = True
            if self._buffer[0] != _TLS_HANDSHAKE:
                self._raw.write(_PLAIN_HTTP)
                self._raw.close()
                return
        super().buffer_updated(nbytes)
        if self._http.transport is not None:
            self._handshakes.end(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Clean up."""
        self._handshakes.end(self)
        super().connection_lost(exc)
