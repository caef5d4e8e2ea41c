"""Hostile input: raw sockets against the real service, and ranges against relay bitmaps."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from shoal_common.bus.keys import storage_key
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.messages.storage import StorageState
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.relay_bitmap import RelayBitmapFile
from shoal_common.store.store_paths import StorePaths
from tests.fileserver.local_fileserver import closed, hollow_blob, local_fileserver
from tests.fileserver.running_fileserver import read_reply, serving
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined
from tests.harness.waiting import eventually

BLOB = "cd" * 32
LEAVES = 4
SIZE = (LEAVES - 1) * LEAF_BYTES + 4096
GOOD, NOT_READY = b"g", b"X"


@pytest.fixture(scope="module")
def arriving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StorePaths, int]]:
    """Run a server in a thread, over a store with a partial blob; yield its port."""
    store = tmp_path_factory.mktemp("store")
    layout = StorePaths(store)
    layout.partial(BLOB).mkdir(parents=True)
    ports: list[int] = []
    loop, stop, up = asyncio.new_event_loop(), asyncio.Event(), threading.Event()

    async def serve() -> None:
        async with local_fileserver(store) as port:
            ports.append(port)
            up.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert up.wait(45)
    yield layout, ports[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(45)
    loop.close()


def asked(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send one request and return the whole response."""
    with socket.create_connection(("127.0.0.1", port), 45) as connection, connection.makefile("rb") as answer:
        connection.sendall(request)
        status = int(answer.readline().split()[1])
        headers = {}
        while line := answer.readline().strip().decode("latin-1"):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, answer.read(int(headers.get("content-length", 0)))


EDGES = st.builds(
    lambda leaf, off: max(leaf * LEAF_BYTES + off, 0), st.integers(0, LEAVES), st.sampled_from([-1, 0, 1, 4095, 4096])
)


@given(
    bits=st.sets(st.integers(0, LEAVES - 1)),
    start=EDGES,
    end=EDGES,
    form=st.sampled_from(["{0}-{1}", "{0}-", "-{1}"]),
)
@examples(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_I1_a_leaf_that_is_not_ready_is_never_sent(
    arriving: tuple[StorePaths, int], bits: set[int], start: int, end: int, form: str
) -> None:
    layout, port = arriving
    data = b"".join((GOOD if leaf in bits else NOT_READY) * LEAF_BYTES for leaf in range(LEAVES))[:SIZE]
    (layout.partial(BLOB) / "data").write_bytes(data)
    layout.relay_bitmap(BLOB).unlink(missing_ok=True)
    with RelayBitmapFile(layout, BLOB, Bitmap(SIZE)) as ready:
        ready.add(bits)
    header = form.format(start, end)
    request = (
        f"GET /v1/blobs/{BLOB} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nRange: bytes={header}\r\n\r\n"
    )
    status, headers, body = asked(port, request.encode())
    assert status in (200, 206, 404, 416)
    if status in (200, 206):
        assert NOT_READY not in body
        first = int(headers.get("content-range", "bytes 0").split()[1].split("-")[0])
        assert body == data[first : first + len(body)]
        meant = set(range(first // LEAF_BYTES, -(-(first + len(body)) // LEAF_BYTES)))
        assert meant <= bits
    else:
        assert NOT_READY not in body and (status == 416 or bits != set(range(LEAVES)))
    wanted = Bitmap(SIZE)
    for leaf in range(LEAVES):
        wanted.add(leaf)
    request = (
        f"POST /v1/blobs/{BLOB}/any HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1\r\n\r\n"
    )
    status, headers, body = asked(port, request.encode() + wanted.to_bytes())
    assert status in (204, 206) and NOT_READY not in body and (status == 206) <= bool(bits)


async def test_I1_a_partial_discarded_while_it_is_read_is_cut_off(tmp_path: Path) -> None:
    layout, size = StorePaths(tmp_path), 1 << 30
    layout.partial(BLOB).mkdir(parents=True)
    with (layout.partial(BLOB) / "data").open("wb") as f:
        f.truncate(size)
    with RelayBitmapFile(layout, BLOB, Bitmap(size)) as ready:
        ready.add(range(1024))
    async with local_fileserver(tmp_path) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(f"GET /v1/blobs/{BLOB} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.to_thread(shutil.rmtree, layout.partial(BLOB))
        assert await closed(reader) < size
        again, other = await asyncio.open_connection("127.0.0.1", port)
        other.write(f"GET /v1/blobs/{BLOB} HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-9\r\n\r\n".encode())
        assert (await read_reply(again)).status == 404
        for each in (writer, other):
            each.close()


async def test_I1_the_fast_path_checks_the_file_each_time(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    data = os.urandom(3 * LEAF_BYTES)
    async with serving(nats, tmp_path, fresh("files")) as server:

        async def leaf(blob: str, leaf: int) -> tuple[int, bytes]:
            reply = await server.blob(blob, f"bytes={leaf * LEAF_BYTES}-{(leaf + 1) * LEAF_BYTES - 1}")
            return reply.status, reply.body

        for number in range(2):
            blob = server.add(data + bytes([number]))
            path = server.layout.blob(blob)
            for n in (0, 1, 2, 0):
                assert await leaf(blob, n) == (206, data[n * LEAF_BYTES : (n + 1) * LEAF_BYTES])
            if number:
                path.unlink()
            else:
                path.chmod(0o644)
                with path.open("r+b") as f:
                    f.write(b"x")
            assert (await leaf(blob, 0))[0] == 404

        async def all_closed() -> bool:
            return not any("blobs/sha256" in path for path in server.open_paths())

        if sys.platform == "linux":
            await eventually(all_closed, "no file stays open for what might be asked")


async def test_I10_hostile_paths_ranges_and_heads_are_refused(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(b"abcdefgh")
        (server.layout.root / "secret").write_text("secret")
        dots = ("..", "%2e%2e", "%2E.", ".%2e", "..%00", "%252e%252e", "%c0%ae%c0%ae", "\\..", "..;")
        slashes = ("/", "%2f", "%5c", "//", "%252f", "/./")
        for (dot, slash), kind in itertools.product(itertools.product(dots, slashes), ("blobs", "leaves")):
            for tail in ("", "/any"):
                reply = await server.ask(f"/v1/{kind}/{dot}{slash}{dot}{slash}secret{tail}")
                assert reply.status in (400, 404, 405) and reply.body != b"secret", (dot, slash)
                assert "location" not in reply.headers
        many = ",".join(f"{n}-{n}" for n in range(4000))
        for header in (
            f"bytes={many}",
            f"bytes={many * 3}",
            "bytes=" + "0" * 30_000 + "-1",
            "bytes=0-1\t",
            "bytes=0x0-1",
            "bytes=+0-1",
            "bytes = 0-1",
            "bytes=1_0-20",
            "bytes=0-1;2-3",
            "BYTES=0-1",
        ):
            reply = await server.blob(blob, header)
            assert (reply.status, reply.body) in ((200, b"abcdefgh"), (206, b"ab"), (431, b"")), header[:40]
        for bomb in (
            b"".join(b"X-%d: %s\r\n" % (n, b"a" * 90) for n in range(10_000)),
            b"Range: bytes=0-1\r\n" * 50_000,
            b"X" * (1 << 20),
        ):
            reply = await server.raw(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n".encode() + bomb)
            assert reply.status in (400, 431)
        for smuggled in (
            b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"Content-Length: -1\r\n\r\n",
            b"Content-Length: 9\r\nContent-Length: 8\r\n\r\n",
        ):
            reply = await server.raw(f"POST /v1/blobs/{blob}/any HTTP/1.1\r\nHost: localhost\r\n".encode() + smuggled)
            assert reply.status == 400, smuggled
        hosts = {
            "Host: evil.example": 403,
            "": 400,
            "Host: a@localhost": 400,
            "Host: localhost\r\nHost: localhost": 400,
        }
        for host, status in hosts.items():
            reply = await server.raw(f"GET /v1/blobs/{blob} HTTP/1.1\r\n{host}\r\n".encode() + b"\r\n" * bool(host))
            assert reply.status == status, host
        absolute = f"GET http://localhost/v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert (await server.raw(absolute.encode())).status == 400
        assert (await server.blob(blob)).body == b"abcdefgh"
        assert server.process.running and "Traceback" not in server.process.output


async def test_500_slow_connections_do_not_keep_an_honest_reader_out(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux has further addresses of loopback without being asked")
    data = os.urandom(LEAF_BYTES) * 16
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(data)
        slow = []
        for n in range(500):
            here = (f"127.0.0.{2 + n % 4}", 0)
            _, writer = await asyncio.open_connection(server.host, server.port, limit=1024, local_addr=here)
            writer.write(
                f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()[: None if n % 3 else 20]
            )
            slow.append(writer)

        async def served() -> bool:
            reply = await server.blob(blob)
            assert reply.status in (200, 503)  # until some of them have not read for a second
            return reply.body == data

        for _ in range(5):
            await eventually(served, "an honest reader is served", deadline_s=45)
        for writer in slow:
            writer.transport.abort()
        assert server.process.running and "Traceback" not in server.process.output


class Counting(RateLimiter):
    """A rate limit that lets everything pass, and counts."""

    def __init__(self) -> None:
        super().__init__(1 << 40)
        self.taken: list[int] = []

    async def acquire(self, count: int) -> None:
        """Count the bytes."""
        self.taken.append(count)


async def test_every_byte_sent_passes_the_rate_limiter_first(tmp_path: Path) -> None:
    size, limiter = 5 * LEAF_BYTES + 1, Counting()
    blob = hollow_blob(tmp_path, size)
    async with local_fileserver(tmp_path, limiter) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for header, count in (("", size), ("Range: bytes=0-1048575\r\n", LEAF_BYTES), ("Range: bytes=0-9\r\n", 10)):
            for _ in range(2):
                limiter.taken.clear()
                writer.write(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode())
                assert len((await read_reply(reader)).body) == sum(limiter.taken) == count
                assert max(limiter.taken) <= LEAF_BYTES
        writer.close()


async def test_the_nodes_upload_limit_is_followed_by_uploads_under_way(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    node, data = fresh("files"), os.urandom(1 << 19)
    async with joined(nats) as here, serving(nats, tmp_path, node) as server:
        blob = server.add(data)
        await here.buckets.state.put(storage_key(node), StorageState(node=node, max_upload_bytes_per_s=1))

        async def held_up() -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
            reader, writer = await server.connect()
            writer.write(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            try:
                await asyncio.wait_for(reader.readexactly(1), 0.5)
            except TimeoutError:
                return reader, writer
            writer.close()
            return None

        reader, writer = await eventually(held_up, "the limit is followed", deadline_s=45)
        await here.buckets.state.put(storage_key(node), StorageState(node=node))
        assert await asyncio.wait_for(reader.readexactly(len(data)), 45) == data
        writer.close()
