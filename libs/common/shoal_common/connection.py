"""The connection to NATS: patient at start, for ever reconnecting, and telling those who must start afresh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import nats
from nats.aio.client import Client
from nats.js import JetStreamContext

from shoal_common.cancelling import keep_cancellations
from shoal_common.errors import Denied, Unavailable
from shoal_common.logs import Log

log = Log("nats")

RECONNECT_WAIT_S = 1
CONNECT_TIMEOUT_S = 3
DRAIN_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 5.0


class Reconnects:
    """Counts connections. Server-side things that a restart of NATS may lose are made anew at each."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Event()

    def happened(self) -> None:
        """The client has connected again."""
        self.count += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_after(self, seen: int) -> int:
        """Return once there was a connection later than number `seen`."""
        while self.count <= seen:
            await self._changed.wait()
        return self.count


class Nats:
    """One process's connection, its JetStream context, and word of reconnections."""

    def __init__(self, client: Client, reconnects: Reconnects) -> None:
        self.client = client
        self.js: JetStreamContext = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self.reconnects = reconnects
        self.wipes = Reconnects()
        """Those connections at which NATS had lost all that it had kept. Counted by the main loop of a service."""

    @property
    def connected(self) -> bool:
        """Whether the server is reached right now."""
        return bool(self.client.is_connected)


@asynccontextmanager
async def connected(servers: list[str], name: str, patience_s: float | None = None) -> AsyncIterator[Nats]:
    """Connect, waiting `patience_s` for a server (None: as long as it takes), and drain at the end.

    Raises Unavailable when patience ends, Denied when the server refuses our credentials.
    """
    keep_cancellations()
    reconnects = Reconnects()
    denied: list[str] = []

    async def on_error(e: Exception) -> None:
        if "authorization" in str(e).lower():
            denied.append(str(e))
        log.debug("nats", problem=str(e) or type(e).__name__)

    async def on_disconnect() -> None:
        if not (client.is_draining or client.is_closed):
            log.warning("lost NATS; reconnecting")

    async def on_reconnect() -> None:
        log.info("NATS is back")
        reconnects.happened()

    client = Client()
    connecting = asyncio.ensure_future(
        client.connect(
            servers=servers,
            name=name,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_S,
            connect_timeout=CONNECT_TIMEOUT_S,
            drain_timeout=DRAIN_TIMEOUT_S,
        )
    )
    where = ", ".join(s.split("@")[-1] for s in servers)
    try:
        waited_s = 0.0
        step_s = min(5.0, patience_s or 5.0)
        while not (await asyncio.wait({connecting}, timeout=step_s))[0]:
            waited_s += step_s
            if denied:
                raise Denied(f"NATS at {where} refuses our credentials: check the user or token in the URL")
            if patience_s is not None and waited_s >= patience_s:
                raise Unavailable(
                    f"no NATS server answers at {where} after {waited_s:.0f} s: is `shoal up` running there?"
                )
            log.warning("waiting for NATS", servers=where, waited_s=waited_s)
        try:
            connecting.result()
        except nats.errors.AuthorizationError:
            raise Denied(f"NATS at {where} refuses our credentials: check the user or token in the URL") from None
        yield Nats(client, reconnects)
    finally:
        connecting.cancel()
        # Draining flushes what was published; a server that is away must not keep us from stopping.
        with suppress(Exception):
            if client.is_connected:
                await asyncio.wait_for(client.drain(), DRAIN_TIMEOUT_S)
            else:
                await asyncio.wait_for(client.close(), DRAIN_TIMEOUT_S)
