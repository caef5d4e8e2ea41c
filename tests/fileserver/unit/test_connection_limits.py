"""Connections that send or read nothing are closed in time, and keep nobody out. The server runs in the test's
process, with small limits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec import structs

from shoal_common.http import bounded_protocol, connection_eviction
from shoal_fileserver.service import BOUNDS
from tests.fileserver.local_fileserver import closed, hollow_blob, local_fileserver
from tests.fileserver.running_fileserver import read_reply

SHORT_S = 0.3
ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def asking(blob: str, range_header: str = "") -> bytes:
    """Return a request for a blob."""
    asked = f"Range: {range_header}\r\n" if range_header else ""
    return f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n{asked}\r\n".encode()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/blobs/abc HTT",
        b"\r\n",
        ASK + b"GET /hea",
        ASK + b"\r\n\r\n",
        b"POST /v1/blobs/"
        + b"ab" * 32
        + b"/any HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nConnection: close\r\n\r\nx",
    ],
)
async def test_I7_a_request_that_never_arrives_complete_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(bounded_protocol, "HEAD_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", SHORT_S)
    async with local_fileserver(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if sent.startswith(ASK):
            writer.write(ASK)
            await reader.readuntil(b"ok\n")
        writer.write(sent.removeprefix(ASK))
        await closed(reader)
        writer.close()


@pytest.mark.parametrize("least_bytes_per_s", [bounded_protocol.MIN_BYTES_PER_S, 10**12])
async def test_I7_a_reader_that_takes_too_little_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_bytes_per_s: int
) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", SHORT_S)
    monkeypatch.setattr(bounded_protocol, "MIN_BYTES_PER_S", least_bytes_per_s)
    size = 8 << 30
    blob = hollow_blob(tmp_path, size)
    async with local_fileserver(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(asking(blob))
        await reader.readuntil(b"\r\n\r\n")
        if least_bytes_per_s == 10**12:  # any rate is too low
            assert await closed(reader, rest_s=SHORT_S / 3) < size
            return
        transport = writer.transport

        async def cut() -> None:
            # The reader's limit pauses reading; a write shows that the other end is closed.
            while not transport.is_closing():
                writer.write(b"\r\n")
                await asyncio.sleep(SHORT_S / 10)

        await asyncio.wait_for(cut(), 45)


async def test_a_slow_reader_is_not_cut_off_while_it_takes_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_protocol, "HEAD_TIMEOUT_S", SHORT_S)
    size = 24 << 20
    blob = hollow_blob(tmp_path, size)
    async with local_fileserver(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(asking(blob))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(2 * SHORT_S)  # longer than the timeout of a head, which a transfer is not
        assert await asyncio.wait_for(reader.readexactly(size), 45) == bytes(size)
        writer.close()


async def test_I7_a_new_client_is_served_and_the_longest_idle_closed(
    tmp_path: Path,
) -> None:
    async with local_fileserver(tmp_path, bounds=structs.replace(BOUNDS, max_connections=5)) as port:
        idle = []
        for _ in range(8):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ASK)
            await reader.readuntil(b"ok\n")
            idle.append((reader, writer))
        for reader, _ in idle[:3]:
            await closed(reader)
        for reader, writer in idle[3:]:
            writer.write(ASK)
            await asyncio.wait_for(reader.readuntil(b"ok\n"), 10)
            writer.close()


@pytest.mark.parametrize("bound", ["max_connections", "max_per_address"])
async def test_I7_beyond_the_bound_is_503_and_beyond_that_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    bounds = structs.replace(BOUNDS, **{bound: 3}, max_refused=2)
    monkeypatch.setattr(connection_eviction, "STALL_TIMEOUT_S", 1e9)
    blob = hollow_blob(tmp_path, 64 << 20)
    async with local_fileserver(tmp_path, bounds=bounds) as port:
        busy = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(asking(blob))
            await reader.readuntil(b"\r\n\r\n")
            busy.append((reader, writer))
        refused = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /hea")
            refused.append((reader, writer))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await closed(reader) == 0, "so many are not even told"
        for reader, writer in refused:
            writer.write(ASK.removeprefix(b"GET /hea") + asking(blob))
            reply = await read_reply(reader)
            assert reply.status == 503 and int(reply.headers["retry-after"]) > 0
            assert await closed(reader) == 0
        for reader, writer in busy:
            assert await asyncio.wait_for(reader.readexactly(64 << 20), 45)
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(ASK)
        await asyncio.wait_for(reader.readuntil(b"ok\n"), 10)
        writer.close()


async def test_a_newcomer_takes_the_place_of_one_that_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = hollow_blob(tmp_path, 64 << 20)
    async with local_fileserver(tmp_path, bounds=structs.replace(BOUNDS, max_per_address=8)) as port:
        stalled = []
        for _ in range(8):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.write(asking(blob))
            await reader.readuntil(b"\r\n\r\n")
            stalled.append(writer)
        monkeypatch.setattr(connection_eviction, "STALL_TIMEOUT_S", -1.0)

        async def served() -> int:
            # A stalled client may be reading at this very moment: then there is no free connection yet.
            while True:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(asking(blob, "bytes=0-9"))
                reply = await read_reply(reader)
                writer.close()
                if reply.status != 503:
                    return reply.status

        assert await asyncio.wait_for(served(), 45) == 206
        for writer in stalled:
            writer.transport.abort()


async def test_a_peer_that_half_closes_still_gets_all_it_requested(tmp_path: Path) -> None:
    size = 24 << 20
    blob = hollow_blob(tmp_path, size)
    async with local_fileserver(tmp_path) as port:
        for requests, bodies in (((asking(blob),), size), ((asking(blob, "bytes=0-99"), asking(blob)), 100 + size)):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"".join(requests))
            writer.write_eof()
            got = 0
            for _ in requests:
                got += len((await read_reply(reader)).body)
            assert got == bodies and await closed(reader) == 0
            writer.close()
