"""A partial blob is served leaf by leaf, and any range of a blob's wanted leaves; over real HTTP."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shoal_common.identity.seals import from_text
from shoal_common.messages import encode
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.store import relay_bitmap as ready_module
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_hash
from shoal_common.store.relay_bitmap import RelayBitmapFile
from tests.fileserver.running_fileserver import Fileserver, Reply, serving
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually

BLOB = "ab" * 32
BY_GIT = "git-" + "c" * 40
DATA = os.urandom(9 * LEAF_BYTES + 12_345)
SIZE = len(DATA)
LEAVES = leaf_count(SIZE)
MIB = LEAF_BYTES


def wanting(*leaves: int) -> bytes:
    """Return the bitmap of these leaves."""
    bitmap = Bitmap(SIZE)
    for leaf in leaves:
        bitmap.add(leaf)
    return bitmap.to_bytes()


async def any_of(server: Fileserver, blob: str, body: bytes, most: int = 64) -> Reply:
    """Request any of these leaves."""
    return await server.ask(f"/v1/blobs/{blob}/any?max_leaves={most}", method="POST", body=body)


def sent_by(reply: Reply) -> list[int]:
    """Return the leaves in a response, after checking its bytes."""
    assert reply.status == 206
    first, last = (int(n) for n in reply.headers["content-range"].split()[1].split("/")[0].split("-"))
    assert first % MIB == 0 and (last + 1 == SIZE or (last + 1) % MIB == 0) and reply.body == DATA[first : last + 1]
    return list(range(first // MIB, -(-(last + 1) // MIB)))


async def test_of_an_arriving_blob_exactly_the_ready_leaves_are_served(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        for blob in (BLOB, BY_GIT):
            with server.begin(blob, DATA, [0, 1, 4, LEAVES - 1]) as ready:
                for header, start, end in (
                    (f"bytes=0-{2 * MIB - 1}", 0, 2 * MIB),
                    (f"bytes={MIB - 1}-{MIB}", MIB - 1, MIB + 1),
                    (f"bytes={4 * MIB}-{5 * MIB - 1}", 4 * MIB, 5 * MIB),
                    (f"bytes={9 * MIB}-", 9 * MIB, SIZE),
                    ("bytes=-5", SIZE - 5, SIZE),
                ):
                    reply = await server.blob(blob, header)
                    assert (reply.status, reply.body) == (206, DATA[start:end]), header
                    assert reply.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
                    assert reply.headers["etag"] == f'"{blob}"' and "repr-digest" not in reply.headers
                    assert (await server.blob(blob, header, "HEAD")).status == 206
                for header in (f"bytes=0-{2 * MIB}", f"bytes={2 * MIB - 1}-{2 * MIB}", f"bytes={3 * MIB}-", ""):
                    reply = await server.blob(blob, header)
                    assert reply.status == 404 and b"relayed" in reply.body, header
                beyond = await server.blob(blob, f"bytes={SIZE}-")
                assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{SIZE}")
                with (server.layout.partial(blob) / "data").open("r+b") as f:
                    f.write(DATA)
                ready.add(range(LEAVES))
                assert (await server.blob(blob)).body == DATA


async def test_I1_ready_leaves_of_another_boot_are_not_served(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        server.begin(BLOB, DATA, [0, 1]).close()
        assert (await server.blob(BLOB, "bytes=0-9")).status == 206
        path = server.layout.relay_bitmap(BLOB)
        with monkeypatch.context() as patch:
            patch.setattr(ready_module, "boot_id", lambda: bytes(16))
            RelayBitmapFile(server.layout, BLOB, Bitmap(SIZE, wanting(0, 1))).close()
        assert (await server.blob(BLOB, "bytes=0-9")).status == 404
        assert (await any_of(server, BLOB, wanting(0, 1))).status == 404
        assert (await server.ask(f"/v1/leaves/{BLOB}")).status == 404
        for damaged in (b"", b"x" * 5, path.read_bytes()[:-1], path.read_bytes() + b"\xff"):
            path.write_bytes(damaged)
            assert (await server.blob(BLOB, "bytes=0-9")).status == 404
        RelayBitmapFile(server.layout, BLOB, Bitmap(SIZE, wanting(0))).close()
        assert (await server.blob(BLOB, "bytes=0-9")).status == 206
        shutil.rmtree(server.layout.partial(BLOB))
        assert (await server.blob(BLOB, "bytes=0-9")).status == 404


async def test_any_answers_every_leaf_once_before_any_twice(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        whole = server.add(DATA)
        with server.begin(BLOB, DATA, [0, 1, 2, 5, 6, LEAVES - 1]):
            for blob, here in ((whole, set(range(LEAVES))), (BLOB, {0, 1, 2, 5, 6, LEAVES - 1})):

                async def some(blob: str = blob) -> Reply | None:
                    reply = await any_of(server, blob, wanting(*range(LEAVES)), most=2)
                    return None if reply.status == 204 else reply

                for _ in range(2):
                    sent: list[int] = []
                    while len(sent) < len(here):
                        # Recently sent leaves are not sent again yet: their receiver may not have published them.
                        sent += sent_by(await eventually(some, "leaves are sent again"))
                    assert sorted(sent) == sorted(here)
            assert (await any_of(server, BLOB, wanting(3, 4, 7, 8))).status == 204
            assert (await any_of(server, BLOB, wanting())).status == 204
        assert (await any_of(server, "ef" * 32, wanting(0))).status == 404


async def test_I10_what_is_no_bitmap_or_no_number_is_refused(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(DATA)
        for body in (b"", b"\xff", b"\xff" * 3, b"\xff" * 1000):
            assert (await any_of(server, blob, body)).status == 400
        assert (await any_of(server, blob, b"\xff" * (1 << 20))).status == 413
        for number in ("0", "-1", "x", "\xb2", "9" * 99, "1" + "&x=1" * 99):
            asked = f"/v1/blobs/{blob}/any?max_leaves={number}"
            assert (await server.ask(asked, method="POST", body=wanting(0))).status == 400, number
        assert (await server.ask(f"/v1/blobs/{blob}/any")).status == 405
        assert len(sent_by(await any_of(server, blob, b"\xff" * 2, most=99_999_999))) == LEAVES


async def test_leaf_lists_are_served_in_pages(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    hashes = b"".join(leaf_hash(DATA[at : at + MIB]) for at in range(0, SIZE, MIB))
    async with serving(nats, tmp_path, fresh("files")) as server:
        blob = server.add(DATA)
        assert (await server.ask(f"/v1/leaves/{blob}")).status == 404
        path = server.layout.leaf_list(blob)
        path.parent.mkdir(parents=True)
        path.write_bytes(leaf_hash(hashes) + hashes)
        assert (await server.ask(f"/v1/leaves/{blob}")).status == 404, "of another file"
        mtime_ns = server.layout.blob(blob).stat().st_mtime_ns
        os.utime(path, ns=(mtime_ns, mtime_ns))
        whole = await server.ask(f"/v1/leaves/{blob}")
        assert (whole.status, whole.body, whole.headers["etag"]) == (200, hashes, f'"{hash_leaf_list(hashes)}"')
        assert "shoal-seal" not in whole.headers
        seal = LeafListSeal(node="a", signed_at_s=1, signature=b"by a")
        for written, sent in ((b"no seal", None), (encode(seal), seal)):
            server.layout.seal(blob).write_bytes(written)
            assert from_text((await server.ask(f"/v1/leaves/{blob}")).headers.get("shoal-seal", "")) == sent
        page = await server.ask(f"/v1/leaves/{blob}", {"Range": "bytes=32-95"})
        assert (page.status, page.body) == (206, hashes[32:96])
        assert page.headers["content-range"] == f"bytes 32-95/{len(hashes)}"
        head = await server.ask(f"/v1/leaves/{blob}", method="HEAD")
        assert (head.status, head.headers["content-length"]) == (200, str(len(hashes)))
        assert (await server.ask(f"/v1/leaves/{blob}", {"Range": f"bytes={len(hashes)}-"})).status == 416

        server.begin(BLOB, DATA, [0, 1]).close()
        assert (await server.ask(f"/v1/leaves/{BLOB}")).body == bytes(len(hashes))
        server.layout.partial_leaves(BLOB).write_bytes(hashes[:64])
        so_far = await server.ask(f"/v1/leaves/{BLOB}")
        assert (so_far.status, so_far.body) == (200, hashes[:64] + bytes(len(hashes) - 64))
        assert so_far.headers["cache-control"] == "no-store" and "etag" not in so_far.headers
        page = await server.ask(f"/v1/leaves/{BLOB}", {"Range": "bytes=40-79"})
        assert (page.status, page.body) == (206, hashes[40:64] + bytes(16))
