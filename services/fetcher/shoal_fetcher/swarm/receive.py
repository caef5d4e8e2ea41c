"""HTTP/1.1 to the fileservers of other nodes: body bytes go from the socket straight into the leaf they belong to.

One exchange at a time on a connection; connections are kept for the next one. No redirects, no proxies (I12). An
answer has a length, and a head of at most 16 KiB; whatever else it is ends the connection.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httptools

from shoal_common.errors import BadName, Corrupt, Denied, Failed, NotFound, ShoalError, Unavailable
from shoal_fetcher.errors import Silent
from shoal_fetcher.swarm.landing import Buffers, Landing, Reply, Whole

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 20.0
"""A node that sends nothing for so long is given up."""
MAX_HEAD_BYTES = 16 << 10
MAX_CONNECTIONS = 16
"""To one address, of all downloads."""
_KEPT_IDLE = 4
_IDLE_S = 10.0
"""Kept for the next request so long: less than fileservers keep them."""
_MAX_OTHER_BODY_BYTES = 64 << 10
"""Of an answer that is none of ours: what is read of it, so that the connection can be used again."""
_MAX_RETRY_S = 8.0
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS = re.compile(rf"(?:\[([0-9a-fA-F:.]{{2,45}})\]|({_LABEL}(?:\.{_LABEL}){{0,9}})):([0-9]{{1,5}})")
_MAX_PORT = 65535
_REMEDY = "see `shoal status`"


class Crowded(Unavailable):
    """The node has as many connections as it will serve; `retry_after_s` says when to come back."""

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait."""
        return float(self.details.get("retry_after_s", 1.0))


class _Broken(Exception):
    """A connection broke off, or was silent. `fresh`: before any byte of the answer."""

    def __init__(self, why: str, fresh: bool) -> None:
        super().__init__(why)
        self.fresh = fresh


class _Quiet(_Broken):
    """Nothing came for too long."""


class _Head:
    """Collects what httptools finds in a head."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.twice = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        key = name.decode("latin-1").lower()
        self.twice |= key in self.headers and key in ("content-length", "content-range", "transfer-encoding")
        self.headers[key] = value.decode("latin-1")


class _Connection(asyncio.BufferedProtocol):
    """One connection, one exchange at a time."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._scratch = bytearray(MAX_HEAD_BYTES)
        self._scratched = 0
        self._landing: Landing | None = None
        self._reply: Reply | None = None
        self._refused: ShoalError | None = None
        self._left = 0
        self._done: asyncio.Future[Reply] | None = None
        self._heard_s = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self.usable = False
        self.used = False

    # What the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.usable = transport, True

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._reply is None or self._landing is None:
            # Nothing was asked for, or the head is to come: a head longer than this is refused below.
            return memoryview(self._scratch)[self._scratched :]
        return self._landing.buffer()[: self._left]

    def buffer_updated(self, count: int) -> None:
        """Bytes have come."""
        self._heard_s = self._loop.time()
        if self._done is None or self._done.done():
            return self.close()  # nobody asked
        try:
            if self._reply is None:
                self._scratched += count
                self._take_head()
            else:
                self._take_body(count)
        except ShoalError as e:
            self._fail(e)

    def eof_received(self) -> bool:
        """The other side sends no more."""
        self._fail(_Broken("it closed the connection", self._fresh))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.usable = False
        self._fail(_Broken(str(exc) if exc else "the connection was closed", self._fresh))

    @property
    def _fresh(self) -> bool:
        return self._reply is None and not self._scratched

    def _take_head(self) -> None:
        seen = memoryview(self._scratch)[: self._scratched]
        end = self._scratch.find(b"\r\n\r\n", 0, self._scratched) + 4
        if end == 3:
            if self._scratched == len(self._scratch):
                raise Corrupt("a node answered with a head that has no end")
            return
        head = _Head()
        parser = httptools.HttpResponseParser(head)
        try:
            parser.feed_data(bytes(seen[:end]))
            status = parser.get_status_code()
        except httptools.HttpParserError:
            raise Corrupt("a node answered something that is not HTTP") from None
        if head.twice or not 200 <= status < 600:
            raise Corrupt("a node answered with a head that makes no sense")
        reply = Reply(status, head.headers)
        self._left = reply.body_bytes
        self.usable = parser.should_keep_alive()
        if status in (200, 206):
            assert self._landing is not None
            self._landing.begin(reply)
        else:
            if self._left > _MAX_OTHER_BODY_BYTES:
                self.usable = False
                self._left = 0
            self._landing = Whole(0, self._left)
        self._landing.use(self._resume)
        rest = bytes(seen[end:])
        self._reply, self._scratched = reply, 0
        if len(rest) > self._left:
            raise Corrupt("a node answered more than it said it would")
        while rest:
            into = self._landing.buffer()[: self._left]
            count = min(len(into), len(rest))
            into[:count] = rest[:count]
            rest = rest[count:]
            self._take_body(count)
        if not self._left:
            self._finish()

    def _take_body(self, count: int) -> None:
        assert self._landing is not None
        self._left -= count
        self._landing.filled(count)
        if not self._left:
            self._finish()
        elif self._landing.waits and self._transport is not None:
            self._transport.pause_reading()

    def _resume(self) -> None:
        self._heard_s = self._loop.time()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done() and self._reply is not None:
            self._done.set_result(self._reply)

    def _fail(self, error: Exception) -> None:
        self.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # What we call

    async def exchange(self, request: bytes, landing: Landing) -> Reply:
        """Send a request and have the answer land. Raises _Broken, Corrupt."""
        assert self._transport is not None
        if not self.usable:
            raise _Broken("the connection was closed", fresh=True)
        self._landing, self._reply, self._scratched = landing, None, 0
        self._done = self._loop.create_future()
        self._heard_s = self._loop.time()
        self._watch = self._loop.call_later(self._silence_s, self._look)
        try:
            self._transport.write(request)
            return await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self.used = True
            self._watch.cancel()
            self._done = self._landing = None

    def _look(self) -> None:
        quiet_s = self._loop.time() - self._heard_s
        if self._landing is not None and self._landing.waits:
            quiet_s = 0.0  # it is we who do not read
        if quiet_s >= self._silence_s:
            self._fail(_Quiet(f"it was silent for {self._silence_s:.0f} s", fresh=False))
        else:
            self._watch = self._loop.call_later(self._silence_s - quiet_s, self._look)

    def close(self) -> None:
        """End it."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()


class PeerClient:
    """Connections to fileservers, kept between requests. `async with` ends them."""

    def __init__(self, silence_s: float = SILENCE_TIMEOUT_S, connect_s: float = CONNECT_TIMEOUT_S) -> None:
        self._silence_s, self._connect_s = silence_s, connect_s
        self.buffers = Buffers()
        self._idle: dict[str, list[tuple[_Connection, float]]] = {}
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._asking: Counter[str] = Counter()

    async def __aenter__(self) -> PeerClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        for kept in self._idle.values():
            for connection, _since_s in kept:
                connection.close()
        self._idle.clear()

    async def ask(
        self,
        node: str,
        address: str,
        method: str,
        path: str,
        headers: Mapping[str, str],
        landing: Landing,
        body: bytes = b"",
    ) -> Reply:
        """Ask a node's fileserver; a 200 or 206 lands. Returns the head of these, or of a 204.

        Raises BadName for an address that is none; Corrupt, NotFound, Denied, Failed, Crowded or Unavailable, naming
        the node.
        """
        parse_address(address)
        fields = {"Host": address, **headers}
        if body:
            fields["Content-Length"] = str(len(body))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        request = "\r\n".join(lines).encode("latin-1") + body
        try:
            async with self._turn(address):
                reply = await self._exchange(address, request, landing)
        except _Quiet as e:
            raise Silent(f"node {node} was left: {e}; {_REMEDY}") from None
        except _Broken as e:
            raise Unavailable(f"node {node} cannot be reached or broke off: {e}; {_REMEDY}") from None
        except OSError as e:
            raise Unavailable(f"node {node} cannot be reached: {e.strerror or e}; {_REMEDY}") from None
        except Corrupt as e:
            raise Corrupt(f"node {node}: {e.message}") from None
        raise_for(reply, node)
        return reply

    @asynccontextmanager
    async def _turn(self, address: str) -> AsyncIterator[None]:
        gate = self._gates.setdefault(address, asyncio.Semaphore(MAX_CONNECTIONS))
        self._asking[address] += 1
        try:
            async with gate:
                yield
        finally:
            self._asking[address] -= 1
            if not self._asking[address]:
                del self._asking[address], self._gates[address]
                self._forget_idle()

    async def _exchange(self, address: str, request: bytes, landing: Landing) -> Reply:
        while True:
            connection = self._take_idle(address) or await self._connect(address)
            used_before = connection.used
            try:
                reply = await connection.exchange(request, landing)
            except _Broken as e:
                if e.fresh and used_before:
                    continue  # the node had closed it by the time that we asked
                raise
            if connection.usable:
                kept = self._idle.setdefault(address, [])
                kept.append((connection, asyncio.get_running_loop().time()))
                if len(kept) > _KEPT_IDLE:
                    kept.pop(0)[0].close()
            return reply

    async def _connect(self, address: str) -> _Connection:
        host, port = parse_address(address)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(lambda: _Connection(self._silence_s), host, port)
        except TimeoutError:
            raise _Quiet(f"it did not answer within {self._connect_s:.0f} s", fresh=False) from None
        return connection

    def _take_idle(self, address: str) -> _Connection | None:
        kept, now_s = self._idle.get(address, []), asyncio.get_running_loop().time()
        while kept:
            connection, since_s = kept.pop()
            if connection.usable and now_s - since_s < _IDLE_S:
                return connection
            connection.close()
        self._idle.pop(address, None)
        return None

    def _forget_idle(self) -> None:
        """Connections to addresses that nobody asks any more do not stay for ever."""
        now_s = asyncio.get_running_loop().time()
        for address, kept in list(self._idle.items()):
            if not kept or kept[-1][1] + _IDLE_S < now_s:
                for connection, _ in self._idle.pop(address):
                    connection.close()


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of where a node says it answers (I10). Raises BadName."""
    match = _ADDRESS.fullmatch(address)
    if not match or int(match[3]) > _MAX_PORT:
        raise BadName(f"{address[:80]!r} is not an address that a node could have")
    return match[1] or match[2], int(match[3])


def raise_for(reply: Reply, node: str) -> None:
    """Raise what a status of a node means; 200, 204 and 206 mean nothing."""
    status, who = reply.status, f"node {node}"
    if status in (200, 204, 206):
        return
    if status in (401, 403):
        raise Denied(
            f"{who} refuses our credentials (HTTP {status}): set SHOAL_SECRET to the cluster's, and its clock"
        )
    if status == 404:
        raise NotFound(f"{who} does not have it (HTTP 404)")
    if status == 416:
        raise Corrupt(f"{who} has another size for this blob (HTTP 416)")
    if status == 503:
        after = reply.headers.get("retry-after", "")
        wait_s = min(float(after), _MAX_RETRY_S) if after.isascii() and after.isdigit() and len(after) < 9 else 1.0
        raise Crowded(f"{who} is busy (HTTP 503); it is asked again in {wait_s:.0f} s", retry_after_s=wait_s)
    if status >= 500:
        raise Unavailable(f"{who} has a fault of its own (HTTP {status}); try again later")
    raise Failed(f"{who} answered HTTP {status}, which makes no sense here")
