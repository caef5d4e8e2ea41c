"""The connection to NATS: waits for a server at start, reconnects for ever, and reports reconnections."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import msgspec
import nats
from nats.js import JetStreamContext

from shoal_common.bus.nats_client import NatsClient, patch_wait_for, silence_eof_warnings
from shoal_common.concurrency.notifier import Notifier
from shoal_common.errors import Denied, Unavailable
from shoal_common.identity.certificates import NATS_HOST
from shoal_common.identity.nkey import Nkey
from shoal_common.identity.node_identity import NodeIdentity, inbox_prefix
from shoal_common.identity.tls import client_context
from shoal_common.logs import StructuredLogger

log = StructuredLogger("nats")

RECONNECT_WAIT_S = 1
CONNECT_TIMEOUT_S = 3
DRAIN_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 5.0


class NatsLogin(msgspec.Struct, frozen=True):
    """How a process proves itself to NATS, and by what it knows the server."""

    key: Nkey
    inbox_prefix: str
    """Of the subjects of its replies; nobody else may subscribe below it."""
    tls: ssl.SSLContext


def login_of(identity: NodeIdentity, user: str) -> NatsLogin:
    """Return the login of a service of a node, or of its `cli`. Raises BadInput for a missing or damaged key."""
    return NatsLogin(identity.nkey(user), inbox_prefix(identity.node, user), client_context(identity.authority))


def login_options(login: NatsLogin | None) -> dict[str, Any]:
    """Return the options of nats-py's `connect` for a login."""
    if login is None:
        return {}
    silence_eof_warnings()
    return {
        "signature_cb": login.key.sign,
        "inbox_prefix": login.inbox_prefix,
        "tls": login.tls,
        "tls_hostname": NATS_HOST,
        # A server that sends anything before TLS is none of ours.
        "tls_handshake_first": True,
    }


_REFUSAL_PAUSES_S = (0.05, 0.2, 0.5)
"""A server that reads its users again, when somebody joins, refuses whoever has not logged in yet."""


class Nats:
    """A process's connection, its JetStream context, and its count of reconnections."""

    def __init__(self, client: NatsClient, reconnects: Notifier) -> None:
        self.client = client
        self.js: JetStreamContext = client.jetstream(timeout=REQUEST_TIMEOUT_S)
        self.reconnects = reconnects
        """Reconnections: state that a restarted NATS may have lost is created again after each."""
        self.store_wipes = Notifier()
        """Connections at which NATS had lost its store; counted by a service's main loop."""

    @property
    def connected(self) -> bool:
        """Whether the client is connected now."""
        return bool(self.client.is_connected)


def _refused(addresses: str) -> Denied:
    return Denied(
        f"NATS at {addresses} refuses our credentials: this node was revoked, its home is a copy, or the user or "
        "token in the URL is wrong; `shoal leave`, then join again with a new invitation"
    )


def _reason_to_give_up(error: Exception, addresses: str) -> Denied | None:
    if "authorization" in str(error).lower():
        return _refused(addresses)
    if isinstance(error, ssl.SSLCertVerificationError):
        return Denied(
            f"the server at {addresses} does not prove to be this cluster's NATS: check the address, and that "
            "nothing stands between"
        )
    return None


@asynccontextmanager
async def connected(
    servers: list[str], name: str, timeout_s: float | None = None, login: NatsLogin | None = None
) -> AsyncIterator[Nats]:
    """Connect, waiting up to `timeout_s` for a server (None: for ever), and drain at the end.

    Raises Unavailable after `timeout_s`, Denied if the server refuses the credentials, also when asked again.
    """
    for pause_s in (*_REFUSAL_PAUSES_S, None):
        async with AsyncExitStack() as stack:
            try:
                nats = await stack.enter_async_context(_connected_once(servers, name, timeout_s, login))
            except Denied:
                if pause_s is None:
                    raise
            else:
                yield nats
                return
        await asyncio.sleep(pause_s)


@asynccontextmanager
async def _connected_once(
    servers: list[str], name: str, timeout_s: float | None, login: NatsLogin | None
) -> AsyncIterator[Nats]:
    patch_wait_for()
    reconnects = Notifier()
    addresses = ", ".join(s.split("@")[-1] for s in servers)
    denied: asyncio.Future[Denied] = asyncio.get_running_loop().create_future()

    async def on_error(e: Exception) -> None:
        text = str(e) or type(e).__name__
        if (reason := _reason_to_give_up(e, addresses)) and not denied.done():
            denied.set_result(reason)
        if "permissions violation" in text.lower():
            log.warning("NATS refused a subject", problem=text)
        log.debug("nats", problem=text)

    async def on_disconnect() -> None:
        if not (client.is_draining or client.is_closed):
            log.warning("lost NATS; reconnecting")

    async def on_reconnect() -> None:
        log.info("reconnected to NATS")
        reconnects.notify()

    client = NatsClient(login.key if login else None)
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
            **login_options(login),
        )
    )
    try:
        waited_s = 0.0
        step_s = min(5.0, timeout_s or 5.0)
        either: set[asyncio.Future[Any]] = {connecting, denied}
        while True:
            await asyncio.wait(either, timeout=step_s, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                break
            if denied.done():
                raise denied.result()
            waited_s += step_s
            if timeout_s is not None and waited_s >= timeout_s:
                raise Unavailable(
                    f"no NATS server answers at {addresses} after {waited_s:.0f} s: is `shoal up` running there?"
                )
            log.warning("waiting for NATS", servers=addresses, waited_s=waited_s)
        try:
            connecting.result()
        except nats.errors.AuthorizationError:
            raise _refused(addresses) from None
        yield Nats(client, reconnects)
    finally:
        connecting.cancel()
        # Draining flushes what was published; a server that is down must not delay stopping.
        with suppress(Exception):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await (client.drain() if client.is_connected else client.close())
