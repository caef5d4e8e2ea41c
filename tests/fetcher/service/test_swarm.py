"""Nodes that fetch the same blob at once: its cost for the hub, liars among them, and kill -9 of any of them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.msg import Msg

from shoal_common import VERSION
from shoal_common.bus import subjects
from shoal_common.bus.cluster_lease import LeaseValue
from shoal_common.bus.keys import liveness_key, origin_key
from shoal_common.messages import decode, encode
from shoal_common.messages.downloads import HaveMessage
from shoal_common.messages.liveness import LivenessRecord, NodeFacts, ProcessIdentity
from shoal_common.store.bitmap import LEAF_BYTES, leaf_count
from shoal_common.store.leaf_hash import leaf_hash
from shoal_common.store.leaf_set import from_bitmap, leaf_range, leaf_ranges, to_bitmap
from shoal_demo.faults import Faults
from tests.fetcher.fault_servers import Answer, Asked, Server, reply, serving
from tests.fetcher.hub_repos import noise
from tests.fetcher.pull_site import Pulls, Site, blobs, check_store
from tests.fetcher.service.test_peers import LIAR, blob_of, claiming
from tests.harness.node import Node, running_nodes

FILE = "model.safetensors"
MANY_ROUNDS = 20
"""Rounds of kills at random points, of each kind, in `make test-long`."""
SLOW = Faults(bytes_per_s=8 * LEAF_BYTES)
AHEAD_BYTES = 8 * LEAF_BYTES
"""Bytes that the hub may have sent into the sockets of a killed process."""


@pytest.fixture
def four(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The site with two more nodes, c and d."""
    homes: Path = tmp_path_factory.mktemp("four")
    services = tuple(site["a"].services)
    more = {n: Node(homes / n, n, site.server.url, services, HF_ENDPOINT=site.hub.base_url) for n in ("c", "d")}
    site.nodes.update(more)
    try:
        with running_nodes(*more.values()):
            yield site
            for node in more.values():
                check_store(node)
    finally:
        for name in more:
            del site.nodes[name]


@asynccontextmanager
async def announced_leaves(here: Pulls, blob: str) -> AsyncIterator[dict[str, int]]:
    """Follow what each node tells the others that it has of a blob: that is on its disk."""
    found: dict[str, int] = {}

    async def receive(message: Msg) -> None:
        have = decode(message.data, HaveMessage)
        found[have.node] = from_bitmap(have.available_leaves)

    subscription = await here.here.client.subscribe(subjects.have("*", blob), cb=receive)
    try:
        yield found
    finally:
        await subscription.unsubscribe()


def asked_leaves(ranges: list[str], size_bytes: int) -> int:
    """Return the leaves that these requests to the hub were for."""
    leaves = 0
    for one in ranges:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", one)
        assert match, one
        leaves |= leaf_range(int(match[1]) // LEAF_BYTES, -(-min(int(match[2]) + 1, size_bytes) // LEAF_BYTES))
    return leaves


async def test_I9_four_simultaneous_nodes_cost_the_hub_each_byte_once(four: Site) -> None:
    size = four.make(files := {FILE: noise(40 * LEAF_BYTES + 7, four.repo), "2.safetensors": noise(9 << 20, "2")})
    four.hub.set_faults(SLOW)
    async with four.join() as here:
        for one in four.nodes.values():
            await one.ready(here.here)
        pulls = [await here.begin(n) for n in "abcd"]
        for node in "abcd":
            relayed = await here.state(node, lambda s: s.done_bytes > 0 and len(s.sources) > 0)
            assert relayed.phase == "fetching", "it is passed on before it is whole"
        four.hub.set_faults(Faults())
        for pull in pulls:
            assert (await pull).ok
        assert four.hub_bytes() == size
        for node in "abcd":
            await here.assert_complete(node, files)
        await here.no_lease_is_left()


async def test_I9_a_killed_origin_is_replaced_and_held_bytes_reused(four: Site) -> None:
    size = four.make(files := {FILE: noise(96 * LEAF_BYTES, four.repo)})
    four.hub.set_faults(SLOW)
    blob = hashlib.sha256(files[FILE]).hexdigest()
    async with four.join() as here, announced_leaves(here, blob) as announced:
        for one in four.nodes.values():
            await one.ready(here.here)
        pulls = {n: await here.begin(n) for n in "abcd"}
        for node in "abcd":
            await here.durable(node, 4 * LEAF_BYTES)
        lease = await here.buckets.lease.get_as(origin_key(blob), LeaseValue)
        assert lease is not None
        others = [n for n in "abcd" if n != lease.node]
        # Before the kill: a leaf that is on its way now may arrive while the next origin asks the hub for it.
        known = 0
        for node in others:
            known |= announced.get(node, 0)
        assert known.bit_count() >= 4
        four[lease.node]["fetcher"].kill()
        asked_before = len(four.hub.stats().files[f"{four.repo}/{FILE}"].ranges)
        four.hub.set_faults(Faults())
        for node in others:
            assert (await pulls[node]).ok
        again = asked_leaves(four.hub.stats().files[f"{four.repo}/{FILE}"].ranges[asked_before:], size)
        assert again and not again & known
        await four[lease.node].restart(here.here, "fetcher")
        sent = four.hub_bytes()
        await here.state(lease.node, lambda s: s.phase == "ready", deadline_s=45.0)
        assert four.hub_bytes() == sent <= size + AHEAD_BYTES
        for node in "abcd":
            await here.assert_complete(node, files)
        pulls[lease.node].cancel()


def flipped(leaf: bytes) -> bytes:
    return bytes([leaf[0] ^ 1]) + leaf[1:]


def zeros(leaf: bytes) -> bytes:
    return bytes(len(leaf))


def same_crc32(leaf: bytes) -> bytes:
    """Return other bytes with the same CRC32, by adding a multiple of its polynomial."""
    bits = (1 << 32) | 0x04C11DB7
    change = bytearray(5)
    for place in range(33):
        change[place // 8] |= (bits >> (32 - place) & 1) << place % 8
    edited = bytes(a ^ b for a, b in zip(leaf[:5], change, strict=True)) + leaf[5:]
    assert edited != leaf and zlib.crc32(edited) == zlib.crc32(leaf)
    return edited


def giving(content: bytes, edit: Callable[[bytes], bytes]) -> Answer:
    """A fileserver that has a blob and alters each leaf of it. It has no leaf list."""
    size = len(content)

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.path.startswith("/v1/leaves/"):
            writer.write(reply(404))
            return
        if asked.body:
            first, end = next(leaf_ranges(from_bitmap(asked.body)))
            end = min(end, first + int(asked.path.partition("max_leaves=")[2]))
        else:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers["range"])
            assert match
            first, end = int(match[1]) // LEAF_BYTES, -(-(int(match[2]) + 1) // LEAF_BYTES)
        edited = [edit(content[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES]) for leaf in range(first, end)]
        last = min(end * LEAF_BYTES, size) - 1
        writer.write(reply(206, b"".join(edited), content_range=f"bytes {first * LEAF_BYTES}-{last}/{size}"))

    return answer


@pytest.mark.parametrize("edit", [flipped, zeros, same_crc32])
async def test_I1_a_peer_that_edits_leaves_is_caught_and_banned(site: Site, edit: Callable[[bytes], bytes]) -> None:
    size = site.make(files := {FILE: noise(24 * LEAF_BYTES, site.repo)})
    async with site.join() as here, serving(giving(files[FILE], edit)) as server:
        await here.pull_ok("a")
        blob = await blob_of(here, FILE)
        site.hub.reset_stats()
        before = site["b"]["fetcher"].log()
        async with claiming(here, server, [blob]):
            state = await here.pull_ok("b")
        await here.assert_complete("b", files)
        log = site["b"]["fetcher"].log()[len(before) :]
        corrupt_count = log.count('msg="corrupt bytes from a node"')
        assert 1 <= corrupt_count <= 2, "it was asked for something, and not after two wrong leaves"
        assert state.sources["a"] >= size and site.hub_bytes() == 0


@asynccontextmanager
async def false_origin(here: Pulls, server: Server, blob: str, content: bytes) -> AsyncIterator[None]:
    """A live node that holds a blob's origin lease and publishes its leaf hashes again and again."""
    live = liveness_key(LIAR, "fileserver")
    holder = ProcessIdentity(uid="liar", host="elsewhere", pid=1)
    await here.buckets.live.put(
        live, LivenessRecord(holder=holder, version=VERSION, facts=NodeFacts(addresses=[server.address]))
    )
    await here.buckets.lease.put(origin_key(blob), LeaseValue(node=LIAR, uid="liar"))
    count = leaf_count(len(content))
    have = HaveMessage(
        node=LIAR,
        blob=blob,
        size_bytes=len(content),
        uid="liar",
        available_leaves=to_bitmap(leaf_range(0, count), count),
        origin=True,
        hashes=b"".join(leaf_hash(content[n * LEAF_BYTES : (n + 1) * LEAF_BYTES]) for n in range(count)),
    )

    async def publish_have() -> None:
        while True:
            await here.here.client.publish(subjects.have(LIAR, blob), encode(have))
            await asyncio.sleep(0.1)

    telling = asyncio.create_task(publish_have())
    try:
        yield
    finally:
        telling.cancel()
        await here.buckets.live.delete(live)
        await here.buckets.lease.delete(origin_key(blob))


async def test_I1_a_false_origin_is_caught_at_the_seal_and_banned(site: Site) -> None:
    """All that it sends matches its hashes, and together it is another blob."""
    size = site.make(files := {FILE: noise(12 * LEAF_BYTES, site.repo)})
    lies = flipped(files[FILE])
    async with site.join() as here, serving(giving(lies, bytes)) as server:
        await here.pull_ok("a")
        blob = await blob_of(here, FILE)
        assert (await here.delete("a")).ok
        site.hub.reset_stats()
        async with false_origin(here, server, blob, lies):
            pull = await here.begin("b")
            await here.durable("b", size)
            assert site.hub_bytes() == 0 and blob not in blobs(site["b"]), "never a name before the seal"
            await here.buckets.lease.delete(origin_key(blob))
            outcome = await pull
            assert outcome.ok, outcome.error
        await here.assert_complete("b", files)
        state = await here.state_now("b")
        assert state is not None and state.sources["hub"] == size <= state.sources[LIAR]
        assert site.hub_bytes() == size and "fetching it again" in site["b"]["fetcher"].log()


@pytest.mark.deadline_s(60.0 + 30.0 * MANY_ROUNDS)
@pytest.mark.parametrize("rounds", [2, pytest.param(MANY_ROUNDS, marks=pytest.mark.long)])
@pytest.mark.parametrize("who", ["origin", "receiver", "sender"])
async def test_I6_kills_at_random_points_end_in_complete_models(site: Site, who: str, rounds: int) -> None:
    draw = random.Random(f"{who} {os.environ.get('SHOAL_KILL_SEED', '')}")
    async with site.join() as here:
        for number in range(rounds):
            repo = f"{site.repo}-{number}"
            size = site.make(files := {FILE: noise(24 * LEAF_BYTES, repo)}, repo)
            site.hub.set_faults(SLOW)
            pulls = {n: await here.begin(n, repo) for n in "ab"}
            at_bytes = draw.randrange(1, 12) * LEAF_BYTES
            for node in "ab":
                await here.state(node, lambda s, at=at_bytes: s.done_bytes >= at, repo)  # type: ignore[misc]
            blob = hashlib.sha256(files[FILE]).hexdigest()
            lease = await here.buckets.lease.get_as(origin_key(blob), LeaseValue)
            origin = lease.node if lease else "a"
            other = "b" if origin == "a" else "a"
            node, service = {
                "origin": (origin, "fetcher"),
                "receiver": (other, "fetcher"),
                "sender": (origin, "fileserver"),
            }[who]
            await site[node].restart(here.here, service)
            site.hub.set_faults(Faults())
            for name in "ab":
                await here.state(name, lambda s: s.phase == "ready", repo, deadline_s=45.0)
                await here.assert_complete(name, files, repo)
                check_store(site[name])
            # While a sender's fileserver is down nobody has its leaves: they may be requested from the hub once.
            assert site.hub_bytes(repo) <= size + {"origin": AHEAD_BYTES, "receiver": 0, "sender": size}[who]
            for pull in pulls.values():
                pull.cancel()  # its command is delivered again some time: the model stays, and that is soon answered
