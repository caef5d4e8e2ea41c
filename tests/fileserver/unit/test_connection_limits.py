"""Connections that send or read nothing are closed in time, and keep nobody out. The server runs in the test's
process, with small limits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_fileserver import blob_api
from shoal_fileserver.http import connection_eviction, connection_limits
from shoal_fileserver.http.connection_eviction import (
    MAX_CONNECTIONS,
    MAX_PER_ADDRESS,
    REFUSE_NEW,
    STALL_TIMEOUT_S,
    ConnectionInfo,
    connection_to_evict,
)
from tests.fileserver.local_fileserver import closed, hollow_blob, local_fileserver
from tests.fileserver.running_fileserver import read_reply

SHORT_S = 0.3
ASK = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def asking(blob: str, range_header: str = "") -> bytes:
    """Return a request for a blob."""
    asked = f"Range: {range_header}\r\n" if range_header else ""
    return f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: x\r\n{asked}\r\n".encode()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/blobs/abc HTT",
        b"\r\n",
        ASK + b"GET /hea",
        ASK + b"\r\n\r\n",
        b"POST /v1/blobs/" + b"ab" * 32 + b"/any HTTP/1.1\r\nContent-Length: 9\r\nConnection: close\r\n\r\nx",
    ],
)
async def test_I7_a_request_that_never_arrives_complete_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connection_limits, "HEAD_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(blob_api, "BODY_TIMEOUT_S", SHORT_S)
    async with local_fileserver(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if sent.startswith(ASK):
            writer.write(ASK)
            await reader.readuntil(b"ok\n")
        writer.write(sent.removeprefix(ASK))
        await closed(reader)
        writer.close()


@pytest.mark.parametrize("least_bytes_per_s", [connection_limits.MIN_BYTES_PER_S, 10**12])
async def test_I7_a_reader_that_takes_too_little_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_bytes_per_s: int
) -> None:
    monkeypatch.setattr(connection_limits, "RATE_CHECK_INTERVAL_S", SHORT_S)
    monkeypatch.setattr(connection_limits, "MIN_BYTES_PER_S", least_bytes_per_s)
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
    monkeypatch.setattr(connection_limits, "HEAD_TIMEOUT_S", SHORT_S)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_eviction, "MAX_CONNECTIONS", 5)
    async with local_fileserver(tmp_path) as port:
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


@pytest.mark.parametrize("bound", ["MAX_CONNECTIONS", "MAX_PER_ADDRESS"])
async def test_I7_beyond_the_bound_is_503_and_beyond_that_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(connection_eviction, bound, 3)
    monkeypatch.setattr(connection_eviction, "STALL_TIMEOUT_S", 1e9)
    monkeypatch.setattr(connection_limits, "MAX_REFUSED_CONNECTIONS", 2)
    blob = hollow_blob(tmp_path, 64 << 20)
    async with local_fileserver(tmp_path) as port:
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
    monkeypatch.setattr(connection_eviction, "MAX_PER_ADDRESS", 8)
    blob = hollow_blob(tmp_path, 64 << 20)
    async with local_fileserver(tmp_path) as port:
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


SEEN = st.builds(
    ConnectionInfo,
    host=st.sampled_from(["a", "b", "c"]),
    idle_s=st.none() | st.floats(0, 100),
    stalled_s=st.none() | st.floats(0, 100),
)


@given(st.sampled_from(["a", "b", "d"]), st.lists(SEEN, max_size=40).map(lambda some: some * 8))
def test_a_connection_is_evicted_only_if_full_and_never_a_reader(host: str, others: list[ConnectionInfo]) -> None:
    own = [seen for seen in others if seen.host == host]
    found = connection_to_evict(host, others)
    if len(own) < MAX_PER_ADDRESS and len(others) < MAX_CONNECTIONS:
        assert found is None
        return
    assert found is not None
    if isinstance(found, int):
        gone = others[found]
        assert gone.idle_s is not None or (gone.stalled_s is not None and gone.stalled_s >= STALL_TIMEOUT_S)
        if len(own) >= MAX_PER_ADDRESS:
            assert gone.host == host
    elif len(own) >= MAX_PER_ADDRESS:
        assert found == REFUSE_NEW and all(
            seen.idle_s is None and (seen.stalled_s or 0) < STALL_TIMEOUT_S for seen in own
        )


def test_eviction_takes_the_busiest_address_and_idle_ones_first() -> None:
    busy = [ConnectionInfo("a")] * (MAX_PER_ADDRESS - 1) + [ConnectionInfo("b")] * (MAX_PER_ADDRESS - 1)
    assert connection_to_evict("c", [*busy, ConnectionInfo("a", idle_s=1), ConnectionInfo("c", idle_s=9)]) == len(
        busy
    )
    assert (
        connection_to_evict("c", [*busy, ConnectionInfo("a", stalled_s=3), ConnectionInfo("c", idle_s=9)])
        == len(busy) + 1
    )
    assert connection_to_evict(
        "c", [*busy, ConnectionInfo("a", stalled_s=3), ConnectionInfo("c", stalled_s=9)]
    ) == len(busy)
    assert (
        connection_to_evict("c", [*busy, ConnectionInfo("a", stalled_s=0.1), ConnectionInfo("c", stalled_s=9)])
        == REFUSE_NEW
    )
    assert connection_to_evict("a", [ConnectionInfo("a")] * MAX_PER_ADDRESS) == REFUSE_NEW
    assert connection_to_evict("c", [ConnectionInfo("a")] * MAX_PER_ADDRESS) is None
