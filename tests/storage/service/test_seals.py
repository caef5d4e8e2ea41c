"""Whose word that a blob is intact counts here, and what becomes of a node that lies (docs/transfer.md)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec import structs

from shoal_common.errors import Corrupt, Refused
from shoal_common.identity import seals
from shoal_common.identity.seals import SealedList
from shoal_common.messages.manifest import LeafListSeal, Manifest
from shoal_common.messages.storage import CommitBlob, Reserve, SealModel, SealShard, StorageState
from shoal_common.settings.node import StorageSettings
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import hash_leaf_list
from tests.harness.fresh import Fresh
from tests.harness.identities import Authority
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.running_storage import Node
from tests.storage.storage_parts import StorageParts, storage_parts
from tests.storage.store_fixtures import Model, leaf_list, put, sha256

WEIGHTS = os.urandom(3 * LEAF_BYTES + 77)
BLOB, SIZE = sha256(WEIGHTS), len(WEIGHTS)
GARBAGE = os.urandom(SIZE)
"""Bytes of the same size, which a liar sends with their own leaf list, under the name of the weights."""
MODEL = Model("org/popular", {"model.safetensors": WEIGHTS, "config.json": b"{}"})
DEADLINE_S = 30.0


class SealedCluster:
    """A node with its storage, and the other members, which sign what they like."""

    def __init__(self, parts: StorageParts, node: Node, authority: Authority) -> None:
        self.parts, self.node, self.authority = parts, node, authority
        self.identities = {name: authority.node(name) for name in ("liar", "honest")}

    def seal(self, data: bytes, signer: str = "liar", blob: str = BLOB) -> LeafListSeal:
        """Return a node's seal of these bytes' leaf list as that of a blob."""
        sealed = SealedList(blob, len(data), hash_leaf_list(leaf_list(data)))
        return seals.sign(self.identities[signer].private_key, signer, sealed, 1e9)

    async def arrive(self, data: bytes) -> None:
        """Let bytes arrive as the weights, with their own leaf list beside them."""
        await self.parts.fetch.reserve(Reserve(manifest=MODEL.manifest))
        layout = self.parts.disk.layout
        put(layout, BLOB, data)
        layout.partial_leaves(BLOB).write_bytes(leaf_list(data))

    async def commit(self, data: bytes, seal: LeafListSeal | None) -> None:
        """Commit the weights by the leaf list of these bytes."""
        await self.arrive(data)
        digest = hash_leaf_list(leaf_list(data))
        await self.parts.fetch.commit(CommitBlob(blob=BLOB, leaf_list_digest=digest, seal=seal))

    async def make_ready(self) -> None:
        """Bring the rest of the model, and make it ready."""
        await self.parts.fetch_blobs(MODEL)
        await self.parts.fetch.seal(SealModel(manifest=MODEL.sealed))

    def sealer(self) -> str:
        """Return who has sealed the weights, by the file beside them."""
        seal = self.parts.context.seals.read(BLOB)
        return seal.node if seal else ""

    async def check_seals(self, until: Callable[[], Awaitable[bool]], what: str) -> None:
        """Let blobs be hashed in the background until this is so."""
        checking = asyncio.create_task(self.parts.verifier.check_seals_forever())
        try:
            await eventually(until, what, DEADLINE_S)
        finally:
            checking.cancel()

    async def state(self) -> StorageState:
        """Return the published state of the storage, as it is now."""
        await self.parts.context.publishing.publish()
        return await self.node.storage_state()


@asynccontextmanager
async def sealed_cluster(
    nats: NatsServer, fresh: Fresh, directory: Path, trust_sealers: str = "cluster", with_identity: bool = True
) -> AsyncIterator[SealedCluster]:
    """A cluster of three members, of which one runs its storage."""
    authority, name = Authority(directory), fresh("node")
    identity = authority.node(name) if with_identity else None
    settings = StorageSettings(headroom_bytes=0, trust_sealers=trust_sealers)
    async with storage_parts(nats, directory / name, name, settings, identity=identity) as parts:
        cluster = SealedCluster(parts, Node(parts.here, nats, directory / name, name), authority)
        await authority.publish(parts.here.buckets)

        async def known() -> bool:
            return all(f"member.{n}" in parts.specs for n in authority.certificates)

        await eventually(known, "the members are known", DEADLINE_S)
        yield cluster


async def test_with_none_a_forged_leaf_list_never_names_a_blob(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with sealed_cluster(nats, fresh, tmp_path, "none") as cluster:
        with pytest.raises(Corrupt, match="hash to"):
            await cluster.commit(GARBAGE, cluster.seal(GARBAGE))
        assert BLOB not in cluster.parts.ledger.blobs
        await cluster.commit(WEIGHTS, cluster.seal(WEIGHTS, "honest"))
        assert cluster.sealer() == cluster.node.node, "hashed here, and sealed by whom hashed it"


@pytest.mark.parametrize("trust_sealers", ["none", "a,b"])
async def test_without_a_cluster_none_and_names_hash_everything(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, trust_sealers: str
) -> None:
    async with sealed_cluster(nats, fresh, tmp_path, trust_sealers, with_identity=False) as cluster:
        with pytest.raises(Corrupt, match="hash to"):
            await cluster.commit(GARBAGE, None)
        assert cluster.sealer() == ""


async def test_a_forged_list_is_quarantined_and_its_sealer_distrusted(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with sealed_cluster(nats, fresh, tmp_path) as cluster:
        await cluster.commit(GARBAGE, cluster.seal(GARBAGE))
        await cluster.make_ready()
        assert await cluster.node.model_state(MODEL) is not None and cluster.sealer() == "liar"

        async def gone() -> bool:
            return await cluster.node.model_state(MODEL) is None

        await cluster.check_seals(gone, "the model is not ready any more")
        await cluster.node.wait_events("model_ready", "quarantined", "sealer_distrusted")
        _, event = (await cluster.node.events())[-1]
        assert (event["sealer"], event["blob"], event["models"]) == ("liar", BLOB, [MODEL.name])
        state = await cluster.state()
        assert state.quarantined == [BLOB] and state.distrusted_sealers == ["liar"]
        with pytest.raises(Corrupt, match="hash to"):
            await cluster.commit(GARBAGE, cluster.seal(GARBAGE))
        # Also after a restart: what is persisted is one file, whose deletion lets its seals count again.
        assert list(cluster.parts.disk.layout.distrusted.iterdir()) == [
            cluster.parts.disk.layout.distrusted_sealer("liar")
        ]
        cluster.parts.disk.layout.distrusted_sealer("liar").unlink()
        await cluster.commit(WEIGHTS, cluster.seal(WEIGHTS))
        assert cluster.sealer() == "liar"


async def test_an_honest_list_is_ready_at_once_and_hashed_later(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with sealed_cluster(nats, fresh, tmp_path) as cluster:
        await cluster.commit(WEIGHTS, cluster.seal(WEIGHTS, "honest"))
        await cluster.make_ready()
        assert cluster.sealer() == "honest"

        async def hashed() -> bool:
            return cluster.sealer() == cluster.node.node

        await cluster.check_seals(hashed, "this node has hashed it")
        assert (await cluster.state()).distrusted_sealers == []
        assert cluster.parts.context.seals.not_hashed_here({BLOB: SIZE, sha256(b"{}"): 2}) == []


async def test_a_disk_that_corrupts_a_blob_is_not_blamed_on_its_sealer(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with sealed_cluster(nats, fresh, tmp_path) as cluster:
        await cluster.commit(WEIGHTS, cluster.seal(WEIGHTS, "honest"))
        await cluster.make_ready()
        path = cluster.parts.disk.layout.blob(BLOB)
        before = path.stat()
        path.chmod(0o644)
        path.write_bytes(GARBAGE)
        path.chmod(0o444)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

        async def quarantined() -> bool:
            return bool(cluster.parts.ledger.quarantined)

        await cluster.check_seals(quarantined, "the blob is in quarantine")
        assert (await cluster.state()).distrusted_sealers == []
        await cluster.commit(WEIGHTS, None)


async def test_a_store_without_seals_is_hashed_once_and_sealed(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with sealed_cluster(nats, fresh, tmp_path) as cluster:
        await cluster.parts.bring_in(MODEL)
        cluster.parts.disk.layout.seal(BLOB).unlink()

        async def sealed() -> bool:
            return cluster.sealer() == cluster.node.node

        await cluster.check_seals(sealed, "this node has sealed it")


async def test_seals_that_do_not_count_cost_a_hashing_here(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with sealed_cluster(nats, fresh, tmp_path) as cluster:
        stranger = Authority(tmp_path / "other").node("honest")
        sealed = SealedList(BLOB, SIZE, hash_leaf_list(leaf_list(GARBAGE)))
        forged = seals.sign(stranger.private_key, "honest", sealed, 1e9)
        replayed = cluster.seal(GARBAGE, blob=sha256(GARBAGE))
        for seal in (None, forged, replayed):
            with pytest.raises(Corrupt, match="hash to"):
                await cluster.commit(GARBAGE, seal)
        revoked = cluster.seal(GARBAGE, "honest")
        await cluster.authority.revoke(cluster.parts.here.buckets, "honest")

        async def unknown() -> bool:
            return "member.honest" not in cluster.parts.specs

        await eventually(unknown, "the member is gone", DEADLINE_S)
        with pytest.raises(Corrupt, match="hash to"):
            await cluster.commit(GARBAGE, revoked)


async def test_with_none_layers_alone_are_refused(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with sealed_cluster(nats, fresh, tmp_path, "none") as cluster:
        ranges = {BLOB: [[0, 1]]}
        await cluster.parts.fetch.reserve(Reserve(manifest=MODEL.sealed, leaf_ranges=ranges))
        layout = cluster.parts.disk.layout
        put(layout, BLOB, WEIGHTS)
        layout.partial_leaves(BLOB).write_bytes(leaf_list(WEIGHTS))
        small = sha256(b"{}")
        put(layout, small, b"{}")
        await cluster.parts.fetch.commit(CommitBlob(blob=small))
        digest = hash_leaf_list(leaf_list(WEIGHTS))
        request = SealShard(
            manifest=MODEL.sealed,
            layers=[[0, 1]],
            leaf_ranges=ranges,
            leaf_list_digests={BLOB: digest},
            seals={BLOB: cluster.seal(WEIGHTS, "honest")},
        )
        with pytest.raises(Refused, match="without the whole model: trust_sealers is 'none'"):
            await cluster.parts.shards.seal(request)


async def test_a_manifest_the_hub_confirmed_replaces_a_nodes_word(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    lie = Model("org/popular", {"model.safetensors": b"other weights", "extra.py": b"1"})
    async with sealed_cluster(nats, fresh, tmp_path) as cluster:
        parts = cluster.parts
        await parts.fetch_blobs(lie)
        unchecked: Manifest = structs.replace(lie.sealed, unchecked_from="liar")
        assert (await parts.fetch.seal(SealModel(manifest=unchecked))).unchecked_from == "liar"
        again = structs.replace(unchecked, revisions=["main", "v1"])
        assert (await parts.fetch.seal(SealModel(manifest=again))).unchecked_from == "liar"
        await parts.fetch_blobs(MODEL)
        state = await parts.fetch.seal(SealModel(manifest=MODEL.sealed))
        assert (state.unchecked_from, state.file_count) == ("", 2)
        view = parts.disk.layout.view(MODEL.name)
        assert {p.name for p in view.iterdir()} == {"model.safetensors", "config.json"}
        assert (view / "model.safetensors").read_bytes() == WEIGHTS
