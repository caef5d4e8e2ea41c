"""The two links of a stage: the predecessor's, which it accepts, and the successor's, which it keeps making.

Both outlive their connections. Each says `up` when a connection is authenticated and `down`, once, when it is gone.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from shoal_common.concurrency.backoff import Backoff
from shoal_common.concurrency.notifier import Notifier
from shoal_common.host.listening import listen
from shoal_common.logs import StructuredLogger
from shoal_inference.stage.errors import LinkClosed, LinkError
from shoal_inference.stage.ring import connection
from shoal_inference.stage.ring.connection import Connection, RingAddress
from shoal_inference.stage.ring.frames import Frame
from shoal_inference.stage.ring.handshake import RingPlace

MAX_HANDSHAKES = 64
"""Unauthenticated connections at a time: the oldest makes room for a new one."""
MAX_HANDSHAKES_PER_ADDRESS = 16
_REJECTIONS_LOG_INTERVAL_S = 60.0
_RECONNECT_BACKOFF = Backoff(0.05, 2.0)

log = StructuredLogger("stage.ring")


class Successor:
    """The link this stage sends on: connects to the last address it was given, again and again."""

    def __init__(
        self,
        place: RingPlace,
        ring: bytes,
        timeout_s: float,
        up: Callable[[], None],
        down: Callable[[LinkError], None],
        node: str = "-",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._place = place
        self._ring = ring
        self._timeout_s = timeout_s
        self._node, self._tls = node, tls
        self._up = up
        self._down = down
        self._address: RingAddress | None = None
        self._changed = Notifier()
        self._logged_unreachable: RingAddress | None = None
        self._live: Connection | None = None

    @property
    def is_up(self) -> bool:
        """Whether frames can be sent now."""
        return self._live is not None

    def target(self, address: RingAddress) -> None:
        """Connect there from now on. The address it has already only cuts a back-off short."""
        if self._live is not None and self._address != address:
            self._live.break_off(LinkClosed(f"the next stage moved to {address.host}:{address.port}"))
        self._address = address
        self._changed.notify()

    def post(self, frame: Frame) -> None:
        """Queue a small frame; raises LinkError when there is no link."""
        self._connected().post(frame)

    async def send(self, frame: Frame) -> None:
        """Send a frame within the frame deadline; raises LinkError when there is no link, or none any more."""
        await self._connected().send(frame)

    async def run(self) -> None:
        """For ever: connect, watch, connect again."""
        failures = 0
        while True:
            seen = self._changed.count
            if self._address is None:
                await self._changed.wait_after(seen)
                continue
            address = self._address
            try:
                live = await connection.connect(address, self._place, self._ring, self._timeout_s, self._tls)
            except LinkError as error:
                failures += 1
                self._log_unreachable(address, error)
                await self._pause(_RECONNECT_BACKOFF.delay_s(failures), seen)
                continue
            if self._address != address:
                live.break_off(LinkClosed("the next stage moved"))
                continue
            failures = 0
            self._log_reached()
            self._live = live
            self._up()
            reason = await live.wait_closed()
            live.break_off(reason)
            self._live = None
            self._down(reason)
            await self._pause(_RECONNECT_BACKOFF.first_s, seen)

    def _log_unreachable(self, address: RingAddress, error: LinkError) -> None:
        """Log once for each address: the attempts go on for ever, and a dead neighbour must not fill the log."""
        if self._logged_unreachable != address:
            self._logged_unreachable = address
            log.warning(
                "next stage is unreachable",
                peer_rank=self._place.successor,
                peer_node=self._node,
                reason=error.message,
            )

    def _log_reached(self) -> None:
        if self._logged_unreachable is not None:
            self._logged_unreachable = None
            log.info("next stage is reachable", peer_rank=self._place.successor, peer_node=self._node)

    async def _pause(self, delay_s: float, seen: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._changed.wait_after(seen)

    def _connected(self) -> Connection:
        if self._live is None:
            raise LinkClosed(f"no link to rank {self._place.successor}")
        return self._live


class Predecessor:
    """The link this stage receives on: a listener, and the newest authenticated connection."""

    def __init__(
        self,
        place: RingPlace,
        ring: bytes,
        timeout_s: float,
        max_payload_bytes: int,
        up: Callable[[], None],
        down: Callable[[LinkError], None],
        on_frame: Callable[[Frame], Awaitable[None]],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._place = place
        self._ring = ring
        self._timeout_s = timeout_s
        self._max_payload_bytes = max_payload_bytes
        self._up = up
        self._down = down
        self._on_frame, self._tls = on_frame, tls
        self._live: Connection | None = None
        self._handshakes: dict[asyncio.Task[None], str] = {}
        """The address of each unauthenticated connection, the oldest first."""
        self._logged_refused: tuple[float, int] | None = None
        self.refused = 0

    @property
    def is_up(self) -> bool:
        """Whether the predecessor is connected."""
        return self._live is not None

    def listen(self, host: str, ports: Sequence[int] = (0,)) -> socket.socket:
        """A listening socket on the first of these ports of `host` that is free, 0 standing for any.

        Raises Unavailable.
        """
        remedy = "stop that program, or set stage_port in node.toml to another port"
        listener = listen(host, ports, "the stage", remedy, MAX_HANDSHAKES)
        listener.setblocking(False)
        return listener

    async def run(self, listener: socket.socket) -> None:
        """For ever: accept, prove, read frames."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    sock, address = await loop.sock_accept(listener)
                except OSError as error:
                    # Out of descriptors, or a peer that left before it was accepted: the listener itself is well.
                    log.warning("cannot accept a connection", reason=str(error))
                    await asyncio.sleep(_RECONNECT_BACKOFF.first_s)
                    continue
                self._make_room(address[0])
                task = group.create_task(self._serve(sock, f"{address[0]}:{address[1]}"))
                self._handshakes[task] = address[0]
                await asyncio.sleep(0)  # it has begun, and closes its socket if it is cancelled

    def _make_room(self, address: str) -> None:
        """End the oldest handshake if there are too many: a stranger's idle connections keep nobody out."""
        own = [task for task, other in self._handshakes.items() if other == address]
        if len(own) >= MAX_HANDSHAKES_PER_ADDRESS:
            own[0].cancel()
        elif len(self._handshakes) >= MAX_HANDSHAKES:
            next(iter(self._handshakes)).cancel()

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            fresh = await connection.accept(
                sock, self._place, self._ring, self._timeout_s, self._max_payload_bytes, self._tls
            )
        except (LinkError, OSError) as error:
            self._refuse(peer, str(error))
            return
        except asyncio.CancelledError:
            self._refuse(peer, "too many unauthenticated connections")
            raise
        finally:
            del self._handshakes[task]
        if self._live is not None:
            # The predecessor would not connect again had it not lost the old connection, and what was on it.
            self._drop(self._live, LinkClosed("it connected again"))
        self._live = fresh
        self._up()
        try:
            while True:
                await self._on_frame(await fresh.read())
        except LinkError as error:
            self._drop(fresh, error)
        finally:
            fresh.break_off(LinkClosed("closed"))

    def _refuse(self, peer: str, reason: str) -> None:
        """Count it, and log it unless one was logged lately: strangers must not fill the log."""
        self.refused += 1
        now_s = asyncio.get_running_loop().time()
        logged_s, logged = self._logged_refused or (-_REJECTIONS_LOG_INTERVAL_S, 0)
        if now_s - logged_s >= _REJECTIONS_LOG_INTERVAL_S:
            self._logged_refused = (now_s, self.refused)
            log.warning("connection rejected", peer=peer, reason=reason, unlogged=self.refused - logged - 1)

    def _drop(self, old: Connection, reason: LinkError) -> None:
        if self._live is old:
            self._live = None
            old.break_off(reason)
            self._down(reason)
