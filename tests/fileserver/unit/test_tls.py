"""The fileserver inside TLS: the same bytes, bounds and deadlines. The server runs in the test's process."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from shoal_common.http import bounded_protocol
from shoal_common.identity.certificates import node_host
from shoal_common.identity.tls import client_context, server_context
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.store_paths import StorePaths
from shoal_common.store.verification_stamp import write_stamp
from shoal_fileserver.http import sendfile
from shoal_fileserver.service import BOUNDS
from tests.fileserver.local_fileserver import NODE, closed, hollow_blob, local_fileserver
from tests.fileserver.running_fileserver import read_reply
from tests.harness.identities import Authority

SHORT_S = 0.3
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SIZE = 5 * LEAF_BYTES + 123

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Served:
    """A running server and a client's context for it."""

    def __init__(self, port: int, client: ssl.SSLContext) -> None:
        self.port, self.client = port, client

    async def connect(self, **options: Any) -> Streams:
        """Connect, and shake hands."""
        return await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.client, server_hostname=node_host(NODE), **options
        )

    async def connect_plainly(self) -> Streams:
        """Connect, and say nothing."""
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def serving(authority: Authority, store: Path, **options: Any) -> AsyncIterator[Served]:
    async with local_fileserver(store, tls=server_context(authority.node(NODE)), **options) as port:
        yield Served(port, client_context(authority.certificate))


def asking(blob: str, start: int = 0, end: int = 0) -> bytes:
    wanted = f"Range: bytes={start}-{end - 1}\r\n" if end else ""
    return f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n{wanted}\r\n".encode()


def random_blob(store: Path) -> tuple[str, bytes]:
    data, name = os.urandom(SIZE), "ab" * 32
    path = StorePaths(store).blob(name)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    write_stamp(name, path)
    return name, data


async def test_ranges_of_every_length_arrive_as_they_are(authority: Authority, tmp_path: Path) -> None:
    blob, data = random_blob(tmp_path)
    async with serving(authority, tmp_path) as server:
        reader, writer = await server.connect()
        ranges = [(0, SIZE), (0, 1), (LEAF_BYTES - 1, LEAF_BYTES + 1), (LEAF_BYTES, 3 * LEAF_BYTES), (SIZE - 9, SIZE)]
        # A leaf that was requested before is answered on the fast path.
        ranges += [(n * LEAF_BYTES, (n + 1) * LEAF_BYTES) for n in (0, 1, 2, 3, 4, 0)]
        for start, end in ranges:
            writer.write(asking(blob, start, end))
            assert (await read_reply(reader)).body == data[start:end], (start, end)
        writer.write(b"".join(asking(blob, start, end) for start, end in ranges[:3]) + HEALTH)
        assert [(await read_reply(reader)).body for _ in range(3)] == [data[start:end] for start, end in ranges[:3]]
        assert (await read_reply(reader)).body == b"ok\n"
        writer.close()


async def test_the_fast_path_is_taken_inside_tls_too(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send_now = sendfile.send_now

    def counted(*arguments: Any) -> int:
        sent.append(send_now(*arguments))
        return sent[-1]

    monkeypatch.setattr("shoal_fileserver.http.bulk_protocol.send_now", counted)
    blob, data = random_blob(tmp_path)
    async with serving(authority, tmp_path) as server:
        reader, writer = await server.connect()
        for _ in range(3):
            writer.write(asking(blob, 0, LEAF_BYTES))
            assert (await read_reply(reader)).body == data[:LEAF_BYTES]
        writer.close()
    assert len(sent) == 2 and all(sent)


async def test_a_slow_reader_is_sent_everything(authority: Authority, tmp_path: Path) -> None:
    size = 24 << 20
    blob = hollow_blob(tmp_path, size)
    async with serving(authority, tmp_path) as server:
        reader, writer = await server.connect(limit=1024)
        writer.write(asking(blob))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(SHORT_S)
        assert await asyncio.wait_for(reader.readexactly(size), 45) == bytes(size)
        writer.close()


async def test_I7_a_reader_that_takes_nothing_is_cut_off(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_protocol, "RATE_CHECK_INTERVAL_S", SHORT_S)
    blob = hollow_blob(tmp_path, 8 << 30)
    async with serving(authority, tmp_path) as server:
        reader, writer = await server.connect(limit=1024)
        writer.write(asking(blob))
        await reader.readuntil(b"\r\n\r\n")
        transport = writer.transport

        async def cut() -> None:
            while not transport.is_closing():
                writer.write(b"\r\n")
                await asyncio.sleep(SHORT_S / 10)

        await asyncio.wait_for(cut(), 45)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_I7_a_handshake_has_the_deadline_of_a_head(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(bounded_protocol, "HEAD_TIMEOUT_S", SHORT_S)
    async with serving(authority, tmp_path) as server:
        reader, writer = await server.connect_plainly()
        writer.write(sent)
        assert await closed(reader) == 0
        writer.close()
        reader, writer = await server.connect()  # and then no head
        assert await closed(reader) == 0
        writer.close()


async def test_I7_unfinished_handshakes_count_as_connections(authority: Authority, tmp_path: Path) -> None:
    bounds = structs.replace(BOUNDS, max_connections=4)
    async with serving(authority, tmp_path, bounds=bounds) as server:
        silent = [await server.connect_plainly() for _ in range(12)]
        reader, writer = await server.connect()
        writer.write(HEALTH)
        assert (await read_reply(reader)).body == b"ok\n"
        for early, _ in silent[:9]:
            assert await closed(early) == 0
        for _, early_writer in silent:
            early_writer.close()
        writer.close()


async def test_what_speaks_no_tls_is_refused_with_a_line(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(authority, tmp_path) as server:
        reader, writer = await server.connect_plainly()
        writer.write(HEALTH)
        assert b"ok" not in await reader.read()
        writer.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=server.client, server_hostname=node_host("another")
            )
        reader, writer = await server.connect()
        writer.write(HEALTH)
        assert (await read_reply(reader)).status == 200
        writer.close()
    assert "TLS handshake failed" in [record.getMessage() for record in caplog.records]


async def test_an_old_version_of_tls_is_not_spoken(authority: Authority, tmp_path: Path) -> None:
    async with serving(authority, tmp_path) as server:
        server.client.minimum_version = ssl.TLSVersion.TLSv1_2
        server.client.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await server.connect()
