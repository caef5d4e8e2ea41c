"""Which seal a fetch has of a blob's leaf list, whom it blames without one, and what an origin signs."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from shoal_common.errors import Unavailable
from shoal_common.identity import seals
from shoal_common.identity.seals import SealedList, SealKeeper
from shoal_common.messages.manifest import LeafListSeal, Manifest, ManifestFile
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_hash
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.partials.blocking import LeafWorkers
from shoal_fetcher.partials.partial_blob import PartialBlob
from shoal_fetcher.sources.failure_policy import BlobHolder, SourceHealth
from shoal_fetcher.swarm.context import BlobFetchContext, NodeFetchContext
from shoal_fetcher.swarm.have_gossip import HaveGossip, PeerHave
from shoal_fetcher.swarm.leaf_list_sync import LeafListSync
from shoal_fetcher.swarm.origin import Origin
from tests.fetcher.control_site import MemoryBucket, Outage
from tests.fetcher.hub_repos import noise
from tests.harness.identities import Authority

DATA = noise(2 * LEAF_BYTES + 5, "sealed")
BLOB = hashlib.sha256(DATA).hexdigest()
LEAVES = [DATA[at : at + LEAF_BYTES] for at in range(0, len(DATA), LEAF_BYTES)]
LIST = b"".join(map(leaf_hash, LEAVES))
OTHER_LIST = leaf_hash(b"other") + LIST[32:]
SEALED = SealedList(BLOB, len(DATA), hash_leaf_list(LIST))
DEADLINE_S = 20.0


class Publishing:
    """What the cluster publishes: node b has the blob, and one digest of its list."""

    def __init__(self, digest: str) -> None:
        self._digest = digest

    def leaf_list_digests(self, _: str) -> set[str]:
        return {self._digest}

    def holders(self, *_: object) -> list[BlobHolder]:
        return [BlobHolder("b", BLOB)] if self._digest else []

    def holders_restarting(self, *_: object) -> list[BlobHolder]:
        return []

    def origin_of(self, _: str) -> None:
        return None

    async def wait_caught_up(self) -> None:
        """Nothing else is published."""


class Fileservers:
    """The other nodes' fileservers: each sends the same list, with this seal."""

    def __init__(self, hashes: bytes, seal: LeafListSeal | None) -> None:
        self._hashes, self._seal, self.asked = hashes, seal, 0

    async def sealed_leaf_list(self, node: str, blob: str, size_bytes: int) -> tuple[bytes, LeafListSeal | None]:
        self.asked += 1
        if (node, blob, size_bytes) != ("b", BLOB, len(LIST)):
            raise Unavailable("it has no such list")
        return self._hashes, self._seal


class Fetching:
    """One fetch of the blob on node a, a member like b and c."""

    def __init__(self, authority: Authority, partial: PartialBlob, hashes: bytes, signer: str) -> None:
        self.authority, self.partial = authority, partial
        identity = authority.node("a")
        keys = {name: authority.node(name).private_key for name in ("b", "c")}
        digest = hash_leaf_list(hashes) if hashes else ""
        self.seal = seals.sign(keys[signer], signer, SEALED, 1e9) if signer else None
        self.peers = Fileservers(hashes, self.seal)
        self.keeper = SealKeeper(identity, authority.certificates.get, lambda: "cluster", lambda: ())
        buckets = type("OneBucket", (), {"lease": MemoryBucket(Outage())})()
        node_context = NodeFetchContext(
            node="a",
            uid="uid-a",
            nats=cast(Any, None),
            buckets=cast(Any, buckets),
            cluster_view=cast(Any, Publishing(digest)),
            hub=cast(Any, None),
            rate_limits=cast(Any, type("Unlimited", (), {"hub": None})()),
            peers=cast(Any, self.peers),
            layout=cast(Any, None),
            workers=cast(Any, None),
            seals=self.keeper,
        )
        progress = type("Silent", (), {"limiter_for": lambda *_: None, "set_waiting_for": lambda *_: None})()
        manifest = Manifest(repo="org/name", commit="0" * 40, files=[])
        file = ManifestFile(path="f", size_bytes=len(DATA), sha256=BLOB)
        self._changed = asyncio.Event()
        self.health = SourceHealth()
        self.fetch = BlobFetchContext(
            node_context,
            manifest,
            file,
            partial,
            self.health,
            cast(Any, progress),
            partial.all_leaves,
            self._changed.set,
        )
        self.gossip = HaveGossip(self.fetch, lambda _: None)
        self.lists = LeafListSync(self.fetch, self.gossip)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Refresh what is known of the list until this is so."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self._changed.clear()
                self.lists.refresh({"b": self.partial.all_leaves}, asyncio.get_running_loop().time())
                if not condition():
                    await self._changed.wait()


@asynccontextmanager
async def fetching(directory: Path, hashes: bytes = LIST, signer: str = "c") -> AsyncIterator[Fetching]:
    """A fetch that has begun; b sends this list with the seal of `signer`."""
    layout = StorePaths(directory / "store")
    layout.partial(BLOB).mkdir(parents=True)
    (layout.partial(BLOB) / "data").touch()
    async with LeafWorkers() as workers, PartialBlob(layout, workers, BLOB, len(DATA)) as partial:
        yield Fetching(Authority(directory / "homes"), partial, hashes, signer)


async def test_a_list_with_a_members_seal_is_taken_with_it(tmp_path: Path) -> None:
    async with fetching(tmp_path) as a:
        await a.until(lambda: bool(a.lists.sealed_digest))
        assert a.lists.seal == a.gossip.seal == a.seal and a.lists.sealed_digest == SEALED.leaf_list_digest
        assert a.health.trusted_sources == set(), "nobody is to blame but its sealer"


@pytest.mark.parametrize(("hashes", "signer"), [(LIST, ""), (OTHER_LIST, "c")], ids=["no seal", "another list's"])
async def test_a_list_without_a_seal_that_counts_is_its_senders_word(
    tmp_path: Path, hashes: bytes, signer: str
) -> None:
    async with fetching(tmp_path, hashes, signer) as a:
        await a.until(lambda: bool(a.lists.sealed_digest))
        assert a.health.trusted_sources == {"b"}, "it is banned if the blob is another one"
        assert a.keeper.refusal(a.lists.seal, SealedList(BLOB, len(DATA), hash_leaf_list(hashes)))


async def test_a_gossiped_seal_of_a_known_list_needs_no_request(tmp_path: Path) -> None:
    async with fetching(tmp_path) as a:
        await a.partial.add_hashes(0, LIST)
        a.gossip.by_node["c"] = PeerHave("c", "uid-c", 0, 0, False, SEALED.leaf_list_digest, a.seal, 0.0)
        await a.until(lambda: bool(a.lists.sealed_digest))
        assert a.lists.seal == a.seal and a.peers.asked == 0


async def read_as_origin(a: Fetching) -> None:
    """Let all leaves be here, and a read and hash them as their origin, to the end."""
    for leaf, data in enumerate(LEAVES):
        await a.partial.write(leaf, data, trust_hash=True)
    origin = Origin(a.fetch, a.gossip, a.lists, lambda: 0)
    async with asyncio.timeout(DEADLINE_S):
        await origin._read_and_seal(None)


async def test_an_origin_signs_what_it_has_hashed(tmp_path: Path) -> None:
    async with fetching(tmp_path, hashes=b"", signer="") as a:
        await read_as_origin(a)
        assert a.keeper.is_own(a.lists.seal, SEALED) and a.gossip.seal == a.lists.seal


async def test_an_origin_never_signs_a_list_that_another_node_sent(tmp_path: Path) -> None:
    """One that arrives once good leaves are hashed may be false, and would have the origin's own seal."""
    async with fetching(tmp_path, LIST, signer="") as a:
        await a.until(lambda: bool(a.lists.sealed_digest))
        a.lists.sealed_digest = ""
        await read_as_origin(a)
        assert a.lists.sealed_digest == "" and a.lists.seal is None
