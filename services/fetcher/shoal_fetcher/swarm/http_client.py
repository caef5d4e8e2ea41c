"""HTTP/1.1 client of other nodes' fileservers: body bytes go from the socket straight into their leaf's buffer.

One exchange at a time per connection; connections are reused for the node that they lead to, which TLS verifies. No
redirects, no proxies (I12). An answer has a length, and a head of at most 16 KiB; anything else ends the
connection.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httptools
import msgspec

from shoal_common.errors import BadName, Corrupt, Denied, InternalError, NotFound, ShoalError, Unavailable
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.tls import tls_error
from shoal_common.messages.liveness import NodeAddress
from shoal_fetcher.errors import PeerTimeout
from shoal_fetcher.swarm.sinks import BodySink, BufferPool, BytesSink, PeerReply

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0
"""A node that sends nothing for this long is left."""
MAX_HEAD_BYTES = 16 << 10
MAX_CONNECTIONS = 16
"""To one address, for all downloads."""
_MAX_IDLE_CONNECTIONS = 4
_IDLE_TIMEOUT_S = 10.0
"""How long a connection is kept for the next request: less than fileservers keep them."""
_MAX_OTHER_BODY_BYTES = 64 << 10
"""How much of an error's body is read, so that the connection can be reused."""
_MAX_RETRY_S = 8.0
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS = re.compile(rf"(?:\[([0-9a-fA-F:.]{{2,45}})\]|({_LABEL}(?:\.{_LABEL}){{0,9}})):([0-9]{{1,5}})")
_MAX_PORT = 65535
_HINT = "see `shoal status`"


class PeerBusy(Unavailable):
    """The node is at its limit of connections; `retry_after_s` says when to retry."""

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait."""
        return float(self.details.get("retry_after_s", 1.0))


class _ConnectionLost(Exception):
    """The connection was lost, or timed out. `is_fresh`: before any byte of the answer."""

    def __init__(self, reason: str, is_fresh: bool) -> None:
        super().__init__(reason)
        self.is_fresh = is_fresh


class _ReadTimeout(_ConnectionLost):
    """Nothing came for too long."""


class _ResponseHead:
    """Collects the headers that httptools parses."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.has_duplicates = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        key = name.decode("latin-1").lower()
        self.has_duplicates |= key in self.headers and key in ("content-length", "content-range", "transfer-encoding")
        self.headers[key] = value.decode("latin-1")


class _Connection(asyncio.BufferedProtocol):
    """One connection, one exchange at a time."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._head_buffer = bytearray(MAX_HEAD_BYTES)
        self._head_bytes = 0
        self._sink: BodySink | None = None
        self._reply: PeerReply | None = None
        self._refused: ShoalError | None = None
        self._remaining = 0
        self._done: asyncio.Future[PeerReply] | None = None
        self._last_data_s = 0.0
        self._silence_timer: asyncio.TimerHandle | None = None
        self.usable = False
        self.used = False

    # Callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport of a new connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.usable = transport, True

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        if self._reply is None or self._sink is None:
            # No request, or its head is to come: a longer head than this is refused below.
            return memoryview(self._head_buffer)[self._head_bytes :]
        return self._sink.buffer()[: self._remaining]

    def buffer_updated(self, count: int) -> None:
        """Process received bytes."""
        self._last_data_s = self._loop.time()
        if self._done is None or self._done.done():
            return self.close()  # no request is open
        try:
            if self._reply is None:
                self._head_bytes += count
                self._take_head()
            else:
                self._take_body(count)
        except ShoalError as e:
            self._fail(e)

    def eof_received(self) -> bool:
        """Handle the end of the stream."""
        self._fail(_ConnectionLost("it closed the connection", self._is_fresh))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the loss of the connection."""
        self.usable = False
        self._fail(_ConnectionLost(str(exc) if exc else "the connection was closed", self._is_fresh))

    @property
    def _is_fresh(self) -> bool:
        return self._reply is None and not self._head_bytes

    def _take_head(self) -> None:
        head_bytes = memoryview(self._head_buffer)[: self._head_bytes]
        end = self._head_buffer.find(b"\r\n\r\n", 0, self._head_bytes) + 4
        if end == 3:
            if self._head_bytes == len(self._head_buffer):
                raise Corrupt("a node sent a head longer than 16 KiB")
            return
        head = _ResponseHead()
        parser = httptools.HttpResponseParser(head)
        try:
            parser.feed_data(bytes(head_bytes[:end]))
            status = parser.get_status_code()
        except httptools.HttpParserError:
            raise Corrupt("a node sent something that is not HTTP") from None
        if head.has_duplicates or not 200 <= status < 600:
            raise Corrupt("a node sent an invalid head")
        reply = PeerReply(status, head.headers)
        self._remaining = reply.body_bytes
        self.usable = parser.should_keep_alive()
        if status in (200, 206):
            assert self._sink is not None
            self._sink.begin(reply)
        else:
            if self._remaining > _MAX_OTHER_BODY_BYTES:
                self.usable = False
                self._remaining = 0
            self._sink = BytesSink(0, self._remaining)
        self._sink.on_resume(self._resume)
        rest = bytes(head_bytes[end:])
        self._reply, self._head_bytes = reply, 0
        if len(rest) > self._remaining:
            raise Corrupt("a node sent more than its Content-Length")
        while rest:
            target = self._sink.buffer()[: self._remaining]
            count = min(len(target), len(rest))
            target[:count] = rest[:count]
            rest = rest[count:]
            self._take_body(count)
        if not self._remaining:
            self._finish()

    def _take_body(self, count: int) -> None:
        assert self._sink is not None
        self._remaining -= count
        self._sink.advance(count)
        if not self._remaining:
            self._finish()
        elif self._sink.is_waiting and self._transport is not None:
            self._transport.pause_reading()

    def _resume(self) -> None:
        self._last_data_s = self._loop.time()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done() and self._reply is not None:
            self._done.set_result(self._reply)

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # Methods of the client

    async def exchange(self, request: bytes, sink: BodySink) -> PeerReply:
        """Send a request and receive the body into `sink`. Raises _ConnectionLost, Corrupt."""
        assert self._transport is not None
        if not self.usable:
            raise _ConnectionLost("the connection was closed", is_fresh=True)
        self._sink, self._reply, self._head_bytes = sink, None, 0
        self._done = self._loop.create_future()
        self._last_data_s = self._loop.time()
        self._silence_timer = self._loop.call_later(self._silence_s, self._check_silence)
        try:
            self._transport.write(request)
            return await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self.used = True
            self._silence_timer.cancel()
            self._done = self._sink = None

    def _check_silence(self) -> None:
        silent_s = self._loop.time() - self._last_data_s
        if self._sink is not None and self._sink.is_waiting:
            silent_s = 0.0  # we are the ones that do not read
        if silent_s >= self._silence_s:
            self._fail(_ReadTimeout(f"it sent nothing for {self._silence_s:.0f} s", is_fresh=False))
        else:
            self._silence_timer = self._loop.call_later(self._silence_s - silent_s, self._check_silence)

    def close(self) -> None:
        """Close the connection."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()


class _Target(msgspec.Struct, frozen=True):
    """Whom a connection leads to, and where."""

    node: str
    link: NodeAddress


class PeerHttpClient:
    """Pool of connections to fileservers. Leaving `async with` closes them."""

    def __init__(
        self, peer_links: PeerLinks, silence_s: float = SILENCE_TIMEOUT_S, connect_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        self._peer_links, self._silence_s, self._connect_s = peer_links, silence_s, connect_s
        self.buffers = BufferPool()
        self._idle: dict[_Target, list[tuple[_Connection, float]]] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._request_counts: Counter[str] = Counter()

    async def __aenter__(self) -> PeerHttpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connections in self._idle.values():
            for connection, _since_s in connections:
                connection.close()
        self._idle.clear()

    async def request(
        self,
        node: str,
        link: NodeAddress,
        method: str,
        path: str,
        headers: Mapping[str, str],
        sink: BodySink,
        body: bytes = b"",
    ) -> PeerReply:
        """Send a request to a node's fileserver; the body of a 200 or 206 goes to `sink`. Returns the head.

        Raises BadName for an invalid address; Corrupt, NotFound, Denied, Failed, PeerBusy or Unavailable, naming the
        node.
        """
        parse_address(link.address)
        fields = {"Host": link.address, **headers}
        if body:
            fields["Content-Length"] = str(len(body))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        request = "\r\n".join(lines).encode("latin-1") + body
        try:
            async with self._slot(link.address):
                reply = await self._exchange(_Target(node, link), request, sink)
        except _ReadTimeout as e:
            raise PeerTimeout(f"node {node} timed out: {e}; {_HINT}") from None
        except _ConnectionLost as e:
            raise Unavailable(f"node {node} is unreachable or the connection broke off: {e}; {_HINT}") from None
        except ssl.SSLError as e:
            raise Unavailable(f"{link.address} does not prove to be node {node}: {tls_error(e)}; {_HINT}") from None
        except OSError as e:
            raise Unavailable(f"node {node} is unreachable: {e.strerror or e}; {_HINT}") from None
        except Corrupt as e:
            raise Corrupt(f"node {node}: {e.message}") from None
        raise_for_status(reply, node)
        return reply

    @asynccontextmanager
    async def _slot(self, address: str) -> AsyncIterator[None]:
        slots = self._slots.setdefault(address, asyncio.Semaphore(MAX_CONNECTIONS))
        self._request_counts[address] += 1
        try:
            async with slots:
                yield
        finally:
            self._request_counts[address] -= 1
            if not self._request_counts[address]:
                del self._request_counts[address], self._slots[address]
                self._close_idle()

    async def _exchange(self, target: _Target, request: bytes, sink: BodySink) -> PeerReply:
        while True:
            connection = self._take_idle(target) or await self._connect(target)
            used_before = connection.used
            try:
                reply = await connection.exchange(request, sink)
            except _ConnectionLost as e:
                if e.is_fresh and used_before:
                    continue  # the node closed it before our request arrived
                raise
            if connection.usable:
                connections = self._idle.setdefault(target, [])
                connections.append((connection, asyncio.get_running_loop().time()))
                if len(connections) > _MAX_IDLE_CONNECTIONS:
                    connections.pop(0)[0].close()
            return reply

    async def _connect(self, target: _Target) -> _Connection:
        host, port = parse_address(target.link.address)
        context, server_hostname = self._peer_links.tls(target.node, target.link) or (None, None)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._silence_s), host, port, ssl=context, server_hostname=server_hostname
                )
        except TimeoutError:
            raise _ReadTimeout(f"it did not answer within {self._connect_s:.0f} s", is_fresh=False) from None
        return connection

    def _take_idle(self, target: _Target) -> _Connection | None:
        connections, now_s = self._idle.get(target, []), asyncio.get_running_loop().time()
        while connections:
            connection, since_s = connections.pop()
            if connection.usable and now_s - since_s < _IDLE_TIMEOUT_S:
                return connection
            connection.close()
        self._idle.pop(target, None)
        return None

    def _close_idle(self) -> None:
        """Close idle connections to addresses that are not asked any more."""
        now_s = asyncio.get_running_loop().time()
        for target, connections in list(self._idle.items()):
            if not connections or connections[-1][1] + _IDLE_TIMEOUT_S < now_s:
                for connection, _ in self._idle.pop(target):
                    connection.close()


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of a node's address (I10). Raises BadName."""
    match = _ADDRESS.fullmatch(address)
    if not match or int(match[3]) > _MAX_PORT:
        raise BadName(f"{address[:80]!r} is not a valid node address")
    return match[1] or match[2], int(match[3])


def raise_for_status(reply: PeerReply, node: str) -> None:
    """Raise the error that a node's status stands for; none for 200, 204 and 206."""
    status, peer = reply.status, f"node {node}"
    if status in (200, 204, 206):
        return
    if status in (401, 403):
        raise Denied(
            f"{peer} refused this node's token (HTTP {status}): one of the two is no member, or its clock is wrong"
        )
    if status == 404:
        raise NotFound(f"{peer} does not have it (HTTP 404)")
    if status == 416:
        raise Corrupt(f"{peer} has another size of this blob (HTTP 416)")
    if status == 503:
        after = reply.headers.get("retry-after", "")
        wait_s = min(float(after), _MAX_RETRY_S) if after.isascii() and after.isdigit() and len(after) < 9 else 1.0
        raise PeerBusy(f"{peer} is busy (HTTP 503): retry in {wait_s:.0f} s", retry_after_s=wait_s)
    if status >= 500:
        raise Unavailable(f"{peer} has an internal error (HTTP {status}); try again later")
    raise InternalError(f"{peer} sent an unexpected status, HTTP {status}")
