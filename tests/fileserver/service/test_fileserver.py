"""The fileserver over real HTTP: exact ranges for peers, and nothing for anybody else."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest

from shoal_common.bus.keys import liveness_key
from shoal_common.messages.liveness import LivenessRecord
from shoal_common.names import model_id
from tests.fileserver.running_fileserver import read_reply, serving
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer, joined
from tests.harness.process import node_environment, started
from tests.harness.waiting import eventually

DATA = bytes(range(256)) * 10_000  # three chunks, the last one short
SIZE = len(DATA)


async def test_a_blob_is_served_in_full_in_ranges_and_by_head(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob, empty = server.add(DATA), server.add(b"")
        whole = await server.blob(blob)
        assert (whole.status, whole.body) == (200, DATA)
        assert whole.headers["etag"] == f'"{blob}"'
        assert whole.headers["accept-ranges"] == "bytes"
        assert whole.headers["content-length"] == str(SIZE)
        assert whole.headers["content-type"] == "application/octet-stream"
        assert "content-range" not in whole.headers
        digest = base64.b64encode(hashlib.sha256(DATA).digest()).decode()
        assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
        for header, start, end in (
            ("bytes=0-0", 0, 1),
            (f"bytes=1048575-{1 << 20}", 1048575, (1 << 20) + 1),
            ("bytes=5-", 5, SIZE),
            ("bytes=-7", SIZE - 7, SIZE),
            (f"bytes=-{SIZE + 9}", 0, SIZE),
            (f"bytes=0-{SIZE * 9}", 0, SIZE),
        ):
            part = await server.blob(blob, header)
            assert part.status == 206 and part.body == DATA[start:end], header
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
            assert part.headers["repr-digest"] == whole.headers["repr-digest"]
            assert part.headers["etag"] == f'"{blob}"' and part.headers["accept-ranges"] == "bytes"
            head = await server.blob(blob, header, method="HEAD")
            changing = {"date"}
            assert {k: v for k, v in head.headers.items() if k not in changing} == {
                k: v for k, v in part.headers.items() if k not in changing
            }
            assert (head.status, head.body) == (206, b"")
        for header in (f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=-0"):
            beyond = await server.blob(blob, header)
            assert (beyond.status, beyond.body) == (416, b"")
            assert beyond.headers["content-range"] == f"bytes */{SIZE}"
        assert (await server.blob(blob, method="HEAD")).headers["content-length"] == str(SIZE)
        nothing = await server.blob(empty)
        assert (nothing.status, nothing.body, nothing.headers["content-length"]) == (200, b"", "0")
        assert (await server.blob(empty, "bytes=0-")).status == 416


async def test_one_connection_serves_many_ranges(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(DATA)
        reader, writer = await server.connect()
        for start in range(0, 1000, 100):
            part = f"Range: bytes={start}-{start + 99}"
            writer.write(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n{part}\r\n\r\n".encode())
            assert (await read_reply(reader)).body == DATA[start : start + 100]
        ask = f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\nRange: bytes=%d-%d\r\n\r\n"
        writer.write("".join(ask % (n, n) for n in range(20)).encode())  # pipelined
        assert [(await read_reply(reader)).body for _ in range(20)] == [DATA[n : n + 1] for n in range(20)]
        writer.close()


async def test_a_range_header_that_is_not_one_range_gets_everything(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    many = "bytes=" + ",".join(f"{n}-{n}" for n in range(2000))
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(b"abcdefgh")
        for header in (
            "bytes=0-1,5-6",
            many,
            "bytes=0-" + "9" * 10_000,
            "bytes=a-b",
            "x",
            "bytes=5-1",
            "bytes=\xb2-\xff",
        ):
            reply = await server.blob(blob, header)
            assert (reply.status, reply.body) == (200, b"abcdefgh"), header[:40]
        twice = f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-1\r\nRange: bytes=4-5\r\n\r\n"
        assert (await server.raw(twice.encode())).body == b"abcdefgh"
        same = {"Range": "bytes=0-1", "If-Range": f'"{blob}"'}
        assert (await server.ask(f"/v1/blobs/{blob}", same)).body == b"ab"
        other = {"Range": "bytes=0-1", "If-Range": '"another"'}
        assert (await server.ask(f"/v1/blobs/{blob}", other)).body == b"abcdefgh"


async def test_what_is_not_http_is_refused_and_the_next_is_served(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(b"abc")
        endless = b"GET / HTTP/1.1\r\n" + b"X-Long: " + b"a" * (1 << 20)
        for rubbish in (b"\0" * 100, b"hello\r\n\r\n", b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n", endless):
            reply = await server.raw(rubbish)
            assert reply.status in (400, 404, 431), rubbish[:20]
        assert (await server.ask(f"/v1/blobs/{blob}", method="DELETE")).status == 405
        assert (
            await server.ask(f"/v1/blobs/{blob}", {"Connection": "Upgrade", "Upgrade": "websocket"})
        ).status == 200
        assert (await server.blob(blob)).body == b"abc"
        assert server.process.running and "Traceback" not in server.process.output


async def test_I10_no_path_reaches_outside_the_blobs(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(b"abc")
        (server.layout.root / "secret").write_text("secret")
        for name in (
            "../../etc/passwd",
            "../../secret",
            "%2e%2e/%2e%2e/secret",
            "..%2f..%2fsecret",
            "%2e%2e",
            "..",
            ".",
            "",
            blob[:2] + "/" + blob,
            blob + "/",
            blob + "%00",
            "%00" * 64,
            blob[:-1],
            blob.upper(),
            "a" * 5000,
            "%ff" * 64,
            "git-" + "a" * 40,
            "g" * 64,
            "ab" * 32,
        ):
            reply = await server.ask(f"/v1/blobs/{name}")
            assert reply.status in (400, 404), name[:60]
            assert b"secret" not in reply.body and b"root:" not in reply.body and "location" not in reply.headers
        for path in ("/", "/v1", "/v1/blobs", "//v1/blobs/" + blob, "/../v1/blobs/" + blob, "/etc/passwd"):
            assert (await server.ask(path)).status == 404, path
        assert (await server.blob(blob)).body == b"abc"


async def test_I1_only_committed_blobs_are_served(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        layout, arriving, by_git, commit = server.layout, "cd" * 32, "git-" + "b" * 40, "c" * 40
        for path in (
            layout.partial(arriving) / "data",
            layout.partial(by_git) / "data",
            layout.manifest(model_id("org/model", commit)),
            layout.tombstones / ("ef" * 32),
            layout.blobs / "zz" / ("ab" * 32),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not to be seen")
        (layout.blobs / "12" / ("12" * 32)).mkdir(parents=True)
        names = (arriving, by_git, commit, "ef" * 32, "ab" * 32, "12" * 32)
        for name in (*names, f"../../partial/{arriving}/data", f"..%2f..%2fpartial%2f{arriving}%2fdata"):
            reply = await server.blob(name)
            assert reply.status in (400, 404) and b"not to be seen" not in reply.body, name


async def test_I1_a_file_without_a_valid_stamp_is_not_served(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        path = server.layout.blob(server.add(DATA))
        copied, kept = tmp_path / "copied", tmp_path / "kept"
        shutil.copy2(path, copied)
        path.rename(kept)
        shutil.copy2(copied, path)  # with the mode and mtime of a blob
        assert (await server.blob(path.name)).status == 404
        path.unlink()
        kept.rename(path)
        assert (await server.blob(path.name)).body == DATA
        path.chmod(0o644)
        with path.open("r+b") as f:
            f.write(b"x")
        path.chmod(0o444)
        for method in ("GET", "HEAD"):
            assert (await server.blob(path.name, method=method)).status == 404
        assert server.open_file_count() < 40


async def test_a_blob_deleted_while_it_is_read_is_read_to_its_end(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    data = os.urandom(1 << 20) * 24
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(data)
        reader, writer = await server.connect()
        writer.write(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert f"content-length: {len(data)}" in head.decode()
        server.layout.blob(blob).unlink()
        assert (await server.blob(blob)).status == 404
        assert await asyncio.wait_for(reader.readexactly(len(data)), 10) == data
        writer.close()


async def test_peers_that_disconnect_in_the_middle_leave_nothing_open(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(bytes(8 << 20))
        await server.blob(blob, "bytes=0-0")
        before = server.open_file_count()
        for _ in range(30):
            reader, writer = await server.connect()
            writer.write(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
        for method, header in (("HEAD", ""), ("GET", "bytes=99999999-")):
            for _ in range(5):
                await server.blob(blob, header, method)

        async def all_closed() -> bool:
            return server.open_file_count() <= before + 1

        await eventually(all_closed, "the files of broken transfers are closed")
        assert "Traceback" not in server.process.output


async def test_hundreds_of_idle_connections_do_not_keep_a_peer_out(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(DATA)
        idle = [await server.connect() for _ in range(400)]
        for n, (_, writer) in enumerate(idle):
            if n % 2:
                writer.write(b"GET /v1/blobs/" + blob.encode())
        for _ in range(3):
            assert (await server.blob(blob)).body == DATA
        assert server.open_file_count() < 300
        for _, writer in idle:
            writer.close()


async def test_readers_that_take_nothing_do_not_keep_a_peer_out(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(bytes(16 << 20))
        stalled = [await server.connect(limit_bytes=1024) for _ in range(60)]
        for _, writer in stalled:
            writer.write(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert len((await server.blob(blob)).body) == 16 << 20
        for _, writer in stalled:
            writer.transport.abort()


@pytest.mark.parametrize("stalled", [False, True])
async def test_a_stop_during_a_transfer_ends_within_the_deadline(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, stalled: bool
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        data = os.urandom(1 << 20) * 32
        blob = server.add(data)
        reader, writer = await server.connect()
        writer.write(f"GET /v1/blobs/{blob} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        idle = await server.connect()
        server.process.send(signal.SIGTERM)
        await server.process.wait_line("msg=stopping")
        if not stalled:
            # A running transfer is finished if its client reads.
            assert await asyncio.wait_for(reader.readexactly(len(data)), 5) == data
        assert await server.process.wait_exit(deadline_s=9) == 0
        for each in (writer, idle[1]):
            each.transport.abort()


async def test_its_liveness_key_has_its_addresses(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    name = fresh("files")
    async with serving(nats, tmp_path, name) as server, joined(nats) as here:

        async def published() -> LivenessRecord | None:
            live = await here.buckets.live.get_as(liveness_key(name, "fileserver"), LivenessRecord)
            return live if live is not None and live.facts.addresses else None

        assert (await eventually(published, "its address")).facts.addresses == [f"127.0.0.1:{server.port}"]


async def test_a_port_that_was_found_free_is_kept(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    environment = node_environment(tmp_path / fresh("files"), nats.url)

    async def port() -> int:
        async with started("-m", "shoal_fileserver", environment=environment) as process:
            found = re.search(r"addresses=[0-9.]+:(\d+)", await process.wait_line("msg=ready"))
            assert found is not None
            return int(found.group(1))

    first = await port()
    assert await port() == first
    with socket.create_server(("127.0.0.1", first)):
        second = await port()
        assert second != first
    assert await port() == second


async def test_a_bad_or_taken_port_ends_the_start_with_one_clear_line(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        for port, code, expected in (
            ("http", 2, "SHOAL_FILESERVER_PORT is 'http'"),
            (str(server.port), 5, "cannot listen on"),
        ):
            environment = node_environment(tmp_path / port, nats.url, SHOAL_FILESERVER_PORT=port)
            async with started("-m", "shoal_fileserver", environment=environment) as process:
                assert await process.wait_exit() == code
                assert expected in process.output and "Traceback" not in process.output
