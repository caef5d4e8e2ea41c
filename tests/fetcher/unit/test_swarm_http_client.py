"""Leaves from fileservers of every kind: bytes land where they belong, and other answers are refused."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal_common.bus import cluster_clock
from shoal_common.errors import BadName, Corrupt, Denied, InternalError, NotFound, ShoalError, Unavailable
from shoal_common.identity.peer_links import PeerLinks
from shoal_common.identity.peer_secrets import PeerSecrets
from shoal_common.identity.peer_tokens import PeerTokens
from shoal_common.messages.liveness import NodeAddress
from shoal_common.store.bitmap import LEAF_BYTES, leaf_count
from shoal_common.store.leaf_set import leaf_range
from shoal_fetcher.swarm.http_client import MAX_HEAD_BYTES, PeerBusy, PeerHttpClient, parse_address
from shoal_fetcher.swarm.peer_client import FileserverClient
from shoal_fetcher.swarm.sinks import BUFFERS_AHEAD, BytesSink, LeafSink
from tests.fetcher.fault_servers import Answer, Asked, Server, reply, serving
from tests.harness.identities import Authority
from tests.harness.waiting import eventually

BLOB = "a" * 64
DATA = random.Random(1).randbytes(5 * LEAF_BYTES + 123)
SIZE = len(DATA)
PLAINLY = PeerLinks(None)
OUTSIDE = PeerTokens("a", PeerSecrets(None, lambda _: None))


def range_reply(first: int, end: int, data: bytes = DATA) -> bytes:
    """Return a valid answer with leaves [first, end)."""
    start, stop = first * LEAF_BYTES, min(end * LEAF_BYTES, len(data))
    return reply(206, data[start:stop], content_range=f"bytes {start}-{stop - 1}/{len(data)}")


class Caught:
    """Received leaves, copied, and returned at once or by `give_back`."""

    def __init__(self, keep: bool = False) -> None:
        self.leaves: dict[int, bytes] = {}
        self.chosen: tuple[int, int] | None = None
        self._keep, self._held = keep, list[Callable[[], None]]()

    def took(self, leaf: int, data: memoryview, done: Callable[[], None]) -> None:
        assert leaf not in self.leaves
        self.leaves[leaf] = bytes(data)
        self._held.append(done)
        if not self._keep:
            self.release()

    def release(self) -> None:
        held, self._held = self._held, []
        for done in held:
            done()

    def chose(self, first: int, end: int) -> None:
        self.chosen = (first, end)

    def is_right(self, first: int, end: int) -> bool:
        return self.leaves == {n: DATA[n * LEAF_BYTES : (n + 1) * LEAF_BYTES] for n in range(first, end)}


def peers_of(client: PeerHttpClient, *servers: Server) -> FileserverClient:
    return FileserverClient(client, OUTSIDE, lambda: {"b": [s.link for s in servers]})


@pytest.mark.parametrize(("first", "end"), [(0, 1), (0, 6), (2, 4), (5, 6)])
async def test_a_range_arrives_leaf_by_leaf(first: int, end: int) -> None:
    caught = Caught()
    async with serving(range_reply(first, end)) as server, PeerHttpClient(PLAINLY) as client:
        await peers_of(client, server).leaves("b", BLOB, SIZE, first, end, caught.took)
        assert caught.is_right(first, end) and client.buffers.out_count == 0
    assert server.asked[0].path == f"/v1/blobs/{BLOB}"
    assert server.asked[0].headers["range"] == f"bytes={first * LEAF_BYTES}-{min(end * LEAF_BYTES, SIZE) - 1}"


async def test_any_reports_the_chosen_range_before_its_bytes_arrive() -> None:
    caught, gate = Caught(), asyncio.Event()
    whole = range_reply(2, 4)
    head = whole.index(b"\r\n\r\n") + 4

    async def slowly(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole[: head + 10])
        await gate.wait()
        writer.write(whole[head + 10 :])

    async with serving(slowly) as server, PeerHttpClient(PLAINLY) as client:
        asking = asyncio.create_task(
            peers_of(client, server).any_leaves("b", BLOB, SIZE, 0b111110, 2, caught.took, caught.chose)
        )
        while caught.chosen is None:
            await asyncio.wait({asking}, timeout=0.01)
        assert caught.chosen == (2, 4) and not caught.leaves
        gate.set()
        assert (await asking).status == 206 and caught.is_right(2, 4)
    assert server.asked[0].path == f"/v1/blobs/{BLOB}/any?max_leaves=2"


async def test_a_source_without_wanted_leaves_keeps_the_connection() -> None:
    caught = Caught()
    answers = iter([b"HTTP/1.1 204 No Content\r\n\r\n", range_reply(0, 1)])

    async def both(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(next(answers))

    connected: list[int] = []
    async with serving(_counting(both, connected)) as server, PeerHttpClient(PLAINLY) as client:
        peers = peers_of(client, server)
        # The test's server reads heads only: a body of one byte would be the first of the next head.
        reply_ = await client.request("b", server.link, "GET", "/x", {}, BytesSink(0, 1))
        assert reply_.status == 204
        await peers.leaves("b", BLOB, SIZE, 0, 1, caught.took)
    assert caught.is_right(0, 1) and len(set(connected)) == 1


def _counting(answer: Answer, ports: list[int]) -> Answer:
    async def counted(asked: Asked, writer: asyncio.StreamWriter) -> None:
        ports.append(writer.get_extra_info("peername")[1])
        await answer(asked, writer)

    return counted


async def test_a_reply_is_not_disturbed_by_another_nodes_connection() -> None:
    asked, go = asyncio.Event(), asyncio.Event()

    async def second_immediately(request: Asked, writer: asyncio.StreamWriter) -> None:
        if request.path == "/later":
            asked.set()
            await go.wait()
        writer.write(range_reply(0, 1))

    async with (
        serving(second_immediately) as one,
        serving(range_reply(0, 1)) as two,
        PeerHttpClient(PLAINLY) as client,
    ):
        await peers_of(client, one).leaves("b", BLOB, SIZE, 0, 1, Caught().took)
        sink = LeafSink(SIZE, lambda first, end: True, Caught().took, client.buffers)
        later = asyncio.create_task(client.request("b", one.link, "GET", "/later", {}, sink))
        await asked.wait()  # on the connection that was kept: none to this node is idle now
        await peers_of(client, two).leaves("b", BLOB, SIZE, 0, 1, Caught().took)
        go.set()
        assert (await later).status == 206


async def test_a_connection_closed_since_its_last_use_is_reopened() -> None:
    caught, ports = Caught(), list[int]()

    async def once(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(range_reply(0, 1))
        await writer.drain()
        writer.close()

    async with serving(_counting(once, ports)) as server, PeerHttpClient(PLAINLY) as client:
        for _ in range(3):
            caught.leaves.clear()
            await peers_of(client, server).leaves("b", BLOB, SIZE, 0, 1, caught.took)
            assert caught.is_right(0, 1)
    assert len(set(ports)) == 3


START = 1 * LEAF_BYTES
WRONG = {
    "another range": range_reply(2, 3),
    "more than was asked for": range_reply(1, 3),
    "less": reply(206, DATA[START : 2 * START - 5], content_range=f"bytes {START}-{2 * START - 6}/{SIZE}"),
    "another size": reply(206, DATA[START : 2 * START], content_range=f"bytes {START}-{2 * START - 1}/{SIZE + 1}"),
    "no range": reply(206, DATA[START : 2 * START]),
    "a length that is not the range's": reply(206, b"x" * 100, content_range=f"bytes {START}-{2 * START - 1}/{SIZE}"),
    "all of it": reply(200, DATA),
    "chunks": b"HTTP/1.1 206 X\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 206 X\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
    "no HTTP": b"not even HTTP\r\n\r\n",
    "a head without an end": b"HTTP/1.1 206 X\r\nx: " + b"y" * (2 * MAX_HEAD_BYTES),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_reply_to_another_request_is_refused_entirely(what: str) -> None:
    caught = Caught()
    async with serving(WRONG[what]) as server, PeerHttpClient(PLAINLY) as client:
        with pytest.raises(Corrupt, match="node b"):
            await peers_of(client, server).leaves("b", BLOB, SIZE, 1, 2, caught.took)
        assert not caught.leaves and client.buffers.out_count == 0


async def test_a_range_not_offered_or_too_long_is_no_reply_to_any() -> None:
    caught = Caught()
    for wanted, most, answer in (
        (0b001110, 1, range_reply(1, 3)),
        (0b001000, 4, range_reply(2, 3)),
        (0b000111, 4, range_reply(2, 4)),
    ):
        async with serving(answer) as server, PeerHttpClient(PLAINLY) as client:
            with pytest.raises(Corrupt, match="another range"):
                await peers_of(client, server).any_leaves("b", BLOB, SIZE, wanted, most, caught.took, caught.chose)
    assert caught.chosen is None and not caught.leaves


async def test_what_came_before_a_node_broke_off_is_kept() -> None:
    caught, whole = Caught(), range_reply(0, 3)

    async def half(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole[: len(whole) - 10])
        await writer.drain()
        writer.close()

    async with serving(half) as server, PeerHttpClient(PLAINLY) as client:
        with pytest.raises(Unavailable, match=r"node b .*broke off"):
            await peers_of(client, server).leaves("b", BLOB, SIZE, 0, 3, caught.took)
        assert caught.is_right(0, 2) and client.buffers.out_count == 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *[(401, Denied), (403, Denied), (404, NotFound), (416, Corrupt), (500, Unavailable), (502, Unavailable)],
        *[(503, PeerBusy), (302, InternalError), (400, InternalError), (418, InternalError)],
    ],
)
async def test_each_status_has_its_error_and_names_the_node(status: int, kind: type[ShoalError]) -> None:
    async with (
        serving(reply(status, b"{}", location="http://127.0.0.1:1/")) as server,
        PeerHttpClient(PLAINLY) as client,
    ):
        with pytest.raises(ShoalError, match="node b") as caught:
            await peers_of(client, server).leaves("b", BLOB, SIZE, 0, 1, Caught().took)
    assert type(caught.value) is kind and len(server.asked) == 1


@pytest.mark.parametrize(("retry_after", "wait_s"), [("3", 3), ("9" * 30, 1), ("soon", 1), ("900", 8)])
async def test_a_busy_node_names_when_to_retry(retry_after: str, wait_s: float) -> None:
    async with serving(reply(503, retry_after=retry_after)) as server, PeerHttpClient(PLAINLY) as client:
        with pytest.raises(PeerBusy) as caught:
            await peers_of(client, server).leaves("b", BLOB, SIZE, 0, 1, Caught().took)
    assert caught.value.retry_after_s == wait_s


async def test_I7_a_stalled_node_times_out_in_its_head_and_in_its_body() -> None:
    for beginning in (b"", b"HTTP/1.1 206 X\r\n", range_reply(0, 1)[:5000]):
        async with serving(_answer_with(beginning)) as server, PeerHttpClient(PLAINLY, silence_s=0.05) as client:
            with pytest.raises(Unavailable, match="sent nothing"):
                await peers_of(client, server).leaves("b", BLOB, SIZE, 0, 1, Caught().took)
            assert client.buffers.out_count == 0


def _answer_with(data: bytes) -> Answer:
    async def some(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await asyncio.Event().wait()

    return some


async def test_a_refused_connection_is_a_down_node_and_another_is_used() -> None:
    caught = Caught()
    async with serving(b"") as gone:
        pass
    async with serving(range_reply(0, 1)) as server, PeerHttpClient(PLAINLY) as client:
        with pytest.raises(Unavailable, match="is unreachable"):
            await peers_of(client, gone).leaves("b", BLOB, SIZE, 0, 1, caught.took)
        await peers_of(client, gone, server).leaves("b", BLOB, SIZE, 0, 1, caught.took)
    assert caught.is_right(0, 1)


async def test_I12_no_proxy_is_used_and_a_token_is_for_one_blob(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    a, b = (authority.tokens(authority.node(node)) for node in "ab")
    async with serving(reply(502)) as proxy, serving(range_reply(0, 1)) as server, PeerHttpClient(PLAINLY) as client:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        peers = FileserverClient(client, a, lambda: {"b": [server.link]})
        await peers.leaves("b", BLOB, SIZE, 0, 1, Caught().took)
    assert not proxy.asked
    now_s = cluster_clock.now_s()
    assert b.allows(BLOB, server.asked[0].headers, now_s) and not b.allows("b" * 64, server.asked[0].headers, now_s)


async def test_a_list_is_read_in_pages_and_each_is_what_was_asked_for() -> None:
    hashes = random.Random(2).randbytes(600_000)

    async def page(asked: Asked, writer: asyncio.StreamWriter) -> None:
        start, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
        body = hashes[int(start) : int(last) + 1]
        writer.write(reply(206, body, content_range=f"bytes {start}-{last}/{len(hashes)}"))

    async with serving(page) as server, PeerHttpClient(PLAINLY) as client:
        assert await peers_of(client, server).leaf_list("b", BLOB, 32, 500_000) == hashes[32:500_032]
    assert len(server.asked) == 2
    for wrong in (reply(206, b"x" * 32, content_range="bytes 0-31/64"), reply(206, b"x" * 31), reply(200, b"x" * 64)):
        async with serving(wrong) as server, PeerHttpClient(PLAINLY) as client:
            with pytest.raises(Corrupt):
                await peers_of(client, server).leaf_list("b", BLOB, 32, 32)


async def test_leaves_in_memory_are_bounded_by_requests_not_by_length() -> None:
    """Nothing is written: received leaves stay in memory, and no more is read than there are buffers for."""
    size_bytes, runs = 64 * LEAF_BYTES, 12
    data = bytes(LEAF_BYTES)

    async def all_of_it(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(206, b"", content_range="x").split(b"content-length")[0])
        last = size_bytes - 1
        writer.write(f"content-length: {size_bytes}\r\ncontent-range: bytes 0-{last}/{size_bytes}\r\n\r\n".encode())
        for _leaf in range(leaf_count(size_bytes)):
            writer.write(data)
            await writer.drain()

    caught = [Caught(keep=True) for _ in range(runs)]
    async with serving(all_of_it) as server, PeerHttpClient(PLAINLY) as client:
        peers = peers_of(client, server)
        asking = [
            asyncio.create_task(peers.leaves("b", BLOB, size_bytes, 0, leaf_count(size_bytes), c.took))
            for c in caught
        ]

        async def full() -> bool:
            return client.buffers.out_count >= BUFFERS_AHEAD

        await eventually(full, "no more leaves are read than there is room for")
        while not all(task.done() for task in asking):
            for one in caught:
                one.release()
            await asyncio.sleep(0)
        assert client.buffers.max_out_count <= BUFFERS_AHEAD + runs and client.buffers.out_count == 0
        await asyncio.gather(*asking)
    assert all(sum(1 << n for n in c.leaves) == leaf_range(0, 64) for c in caught)


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("10.0.0.2:80", ("10.0.0.2", 80)),
        ("[fd00::7]:65535", ("fd00::7", 65535)),
        ("node-b.lan:1234", ("node-b.lan", 1234)),
    ],
)
def test_an_address_of_a_peer_is_a_host_and_a_port(address: str, parsed: tuple[str, int]) -> None:
    assert parse_address(address) == parsed


@pytest.mark.parametrize(
    "address",
    [
        *["", "host", "host:", ":80", "host:99999", "a b:1", "[nonsense:1", "user@host:1", "host:1/x", "host:1#"],
        *["a..b:1", "x" * 300 + ":1", "host:²", "host:80\n", "-a:1"],
    ],
)
async def test_I10_an_impossible_address_is_refused_before_use(address: str) -> None:
    with pytest.raises(BadName):
        parse_address(address)
    async with PeerHttpClient(PLAINLY) as client:
        with pytest.raises(BadName):
            peers = FileserverClient(client, OUTSIDE, lambda: {"b": [NodeAddress(address=address)]})
            await peers.leaves("b", BLOB, SIZE, 0, 1, Caught().took)
        with pytest.raises(BadName):
            peers = FileserverClient(client, OUTSIDE, lambda: {"b": [NodeAddress(address="h:1")]})
            await peers.leaves("b", "../health", SIZE, 0, 1, Caught().took)
