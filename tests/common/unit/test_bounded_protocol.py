"""Connections over a real socket to a small application: nothing that a client does is without a bound."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from shoal_common.http import bounded_protocol, connection_eviction
from shoal_common.http.bounded_protocol import (
    MAX_HEADERS,
    MAX_PIPELINED,
    UNCOUNTED_BODY_BYTES,
    BoundedHttpProtocol,
)
from tests.common.http_application import (
    BODY_BYTES,
    BOUNDS,
    DEADLINE_S,
    LARGE_BYTES,
    STREAM_BYTES,
    closed,
    configured,
    reply,
    request,
    serving,
)

SHORT_S = 0.2
LONG_S = 0.5
"""Longer than a busy machine delays a client that is slow on purpose."""


async def send_until_closed(writer: asyncio.StreamWriter, piece: bytes, count: int) -> int:
    """Send a piece so many times; return how often it could be sent."""
    async with asyncio.timeout(DEADLINE_S):
        for sent in range(count):
            try:
                writer.write(piece)
                await writer.drain()
            except ConnectionError:
                return sent
    return count


@pytest.mark.parametrize("path", ["/read", "/wait"])
async def test_I7_a_body_that_stops_arriving_ends_its_request(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", SHORT_S)
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(request(path, 1000) + b"x")
        if path == "/read":
            assert (await reply(reader))[0] == 408
        assert await closed(reader) == b""
        writer.close()


async def test_I7_a_slow_body_is_dropped_after_its_response_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", SHORT_S)
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(request("/ignore", 1 << 20))
        assert await reply(reader) == (200, b"")

        async with asyncio.timeout(DEADLINE_S):
            while not writer.is_closing():
                writer.write(b"x")
                await asyncio.sleep(SHORT_S / 10)


async def test_a_body_at_the_minimum_rate_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", LONG_S)
    monkeypatch.setattr(bounded_protocol, "MIN_BYTES_PER_S", 1)
    async with serving() as server:
        server.released.set()
        reader, writer = await server.connect()
        writer.write(request("/read", 12))
        for _ in range(12):
            writer.write(b"x")
            await asyncio.sleep(LONG_S / 5)
        assert await reply(reader) == (200, b"12")
        writer.close()


@pytest.mark.parametrize("upgrade", [(), ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")])
async def test_a_slow_reader_of_a_stream_has_no_minimum_rate(
    monkeypatch: pytest.MonkeyPatch, upgrade: tuple[str, ...]
) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", SHORT_S / 4)
    monkeypatch.setattr(bounded_protocol, "HEAD_TIMEOUT_S", SHORT_S / 4)
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(request("/stream", None, *upgrade))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(4 * SHORT_S)
        async with asyncio.timeout(DEADLINE_S):
            await reader.readexactly(STREAM_BYTES)
        writer.close()


@pytest.mark.parametrize("more", [(), ("Connection: close",)])
async def test_I7_who_reads_nothing_of_a_response_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", SHORT_S)
    async with serving() as server:
        _, writer = await server.connect()
        writer.write(request("/large", None, *more))
        await server.has_connections(1)
        await server.has_connections(0)
        writer.transport.abort()


async def test_who_reads_a_response_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", LONG_S)
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(request("/large"))
        await reader.readuntil(b"\r\n\r\n")
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(32):
                await reader.readexactly(LARGE_BYTES // 32)
                await asyncio.sleep(LONG_S / 12)
        writer.close()


async def test_I7_bodies_that_trickle_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_eviction, "STALL_TIMEOUT_S", 0.0)
    async with serving() as server:
        slow = []
        for _ in range(BOUNDS.max_connections):
            _, writer = await server.connect()
            writer.write(request("/read", 1000) + b"x")
            slow.append(writer)
        await server.has_connections(BOUNDS.max_connections)
        for writer in slow:
            writer.write(b"x")
        reader, writer = await server.connect()
        writer.write(request("/ignore"))
        assert await reply(reader) == (200, b"")
        for each in (*slow, writer):
            each.transport.abort()


async def test_I7_a_body_past_the_bound_is_413_or_disconnects() -> None:
    def chunked(path: str) -> bytes:
        return request(path, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")

    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    async with serving() as server:
        server.released.set()
        for sent in (request("/read", BODY_BYTES + 1), chunked("/read") + 20 * chunk):
            reader, writer = await server.connect()
            writer.write(sent)
            assert (await reply(reader))[0] == 413
            writer.close()
        server.released.clear()
        reader, writer = await server.connect()
        writer.write(chunked("/begin"))
        assert await send_until_closed(writer, chunk, 1 << 12) < 1 << 10
        writer.close()
        await server.bodies_bytes_are(0)


async def test_I7_large_bodies_share_a_bound_and_small_ones_pass() -> None:
    async with serving() as server:
        large = []
        for _ in range(2):
            reader, writer = await server.connect()
            writer.write(request("/read", BODY_BYTES) + bytes(BODY_BYTES - 1))
            large.append((reader, writer))
        held = 2 * (BODY_BYTES - 1 - UNCOUNTED_BODY_BYTES)
        await server.bodies_bytes_are(held)
        reader, writer = await server.connect()
        writer.write(request("/read", BODY_BYTES) + bytes(BODY_BYTES))
        assert (await reply(reader))[0] == 503
        writer.write(request("/read", UNCOUNTED_BODY_BYTES) + bytes(UNCOUNTED_BODY_BYTES))
        large[1][1].transport.abort()
        await server.bodies_bytes_are(held // 2)
        server.released.set()
        large[0][1].write(b"x")
        assert await reply(reader) == (200, b"%d" % UNCOUNTED_BODY_BYTES)
        assert await reply(large[0][0]) == (200, b"%d" % BODY_BYTES)
        await server.bodies_bytes_are(0)
        for _, each in (*large, (reader, writer)):
            each.close()


async def test_I7_requests_in_a_row_are_bounded_and_in_order() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(request("/wait") + b"".join(request("/read", 1) + b"x" for _ in range(MAX_PIPELINED)))
        server.released.set()
        assert [await reply(reader) for _ in range(MAX_PIPELINED + 1)] == [(200, b"")] + [(200, b"1")] * MAX_PIPELINED
        server.released.clear()
        writer.write(request("/wait") * (MAX_PIPELINED + 2))
        assert await closed(reader) == b""
        writer.close()


@pytest.mark.parametrize("before", [b"", request("/wait"), request("/wait", 1)])
@pytest.mark.parametrize("endless", [b"x: y\r\n" * 1000, b"y" * 5000])
async def test_I7_a_head_that_never_ends_is_cut_off(before: bytes, endless: bytes) -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(before + (b"x" if b"POST" in before else b"") + b"GET / HTTP/1.1\r\nHost: localhost\r\nx: ")
        assert await send_until_closed(writer, endless, 1 << 16) < 1 << 14
        writer.close()
        assert not before or await closed(reader) == b""


async def test_I7_too_many_headers_are_431_however_they_arrive() -> None:
    async with serving() as server:
        reader, writer = await server.connect()
        writer.write(request("/ignore", None, *["x: y"] * (MAX_HEADERS - 1)))
        assert (await reply(reader))[0] == 200
        writer.write(request("/ignore", None, *["x: y"] * MAX_HEADERS))
        assert (await reply(reader))[0] == 431
        writer.close()


class Transport(asyncio.Transport):
    """A connection of which a test is the other end."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closing, self.answered = b"", False, asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        """Keep what is sent."""
        self.written += data
        if len(self.statuses()) == len(ANSWERED):
            self.answered.set()

    def statuses(self) -> list[int]:
        """Return the statuses of the responses."""
        return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", self.written)]

    def is_closing(self) -> bool:
        """Whether it is closed."""
        return self.closing

    def close(self) -> None:
        """Close it: nothing more is answered."""
        self.closing = True
        self.answered.set()

    abort = close

    def pause_reading(self) -> None:
        """Receive nothing for now: a test sends nevertheless."""

    resume_reading = pause_reading

    def get_write_buffer_size(self) -> int:
        """Everything is read at once."""
        return 0


SENT = b"".join(
    (
        request("/read", 40_000) + bytes(40_000),
        request("/ignore", None, "x: " + "y" * 20_000),
        request("/ignore", None, "Host: localhost"),
        request("/ignore", 5) + b"12345",
        request("/read", BODY_BYTES + 1),
    )
)
ANSWERED = [200, 200, 400, 200, 413]


@given(st.lists(st.integers(1, len(SENT) - 1), max_size=8), st.booleans())
@example([25_027, 43_033], True)  # the body before a head counted as part of it
def test_however_bytes_are_cut_the_answers_are_the_same(cuts: list[int], in_one_go: bool) -> None:
    async def statuses() -> list[int]:
        released = asyncio.Event()
        released.set()
        config, rules = configured(released)
        protocol = BoundedHttpProtocol(config, ServerState(), {})
        protocol.rules = rules
        transport = Transport()
        protocol.connection_made(transport)
        for start, end in itertools.pairwise([0, *sorted(cuts), len(SENT)]):
            protocol.data_received(SENT[start:end])
            if not in_one_go:
                await asyncio.sleep(0)
        async with asyncio.timeout(DEADLINE_S):
            await transport.answered.wait()
        protocol.connection_lost(None)
        assert rules.bodies_bytes == 0
        return transport.statuses()

    assert asyncio.run(statuses()) == ANSWERED
