"""What shards count for in quota and free space (I3)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import QuotaExceeded
from shoal_common.messages.envelope import Empty
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import Reserve, ReserveResult, SealShard, ShardState
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import hash_leaf_list
from shoal_storage.ledger.entries import PartialBlobInfo, Shard
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.ledger_builder import build_ledger
from tests.storage.running_storage import WAIT_TIMEOUT_S, on_node
from tests.storage.service.test_volumes import FIRST as FILLS_THE_STORE
from tests.storage.service.test_volumes import machine
from tests.storage.shard_fixtures import (
    BLOB,
    CONFIG,
    FIRST,
    FIRST_BYTES,
    LAST_BYTES,
    LEAVES,
    MODEL,
    SECOND,
    TWIN,
    WEIGHTS,
    arrive,
    bring_in,
    complete,
    leaf_list,
    lease,
    published_shard,
    reserve,
    seal,
)


async def test_I3_a_shard_counts_only_its_leaves_before_and_after(
    nats: NatsServer, tmp_path: Path, fresh: Fresh
) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node, node.storage():
        assert set((await reserve(node, FIRST)).missing) == {BLOB, CONFIG}
        assert (await node.storage_state()).reserved_bytes == FIRST_BYTES
        state = await bring_in(node, [0, 2], FIRST)
        assert (state.size_bytes, state.total_bytes) == (FIRST_BYTES, MODEL.sealed.size_bytes)
        assert await published_shard(node) == state and state.layers == [[0, 2]]
        disk = await node.storage_state()
        assert (disk.reserved_bytes, disk.used_bytes) == (0, FIRST_BYTES), (
            "it is present, and nothing more is to come"
        )
        assert await node.model_state(MODEL) is None, "a part is not the model"


async def test_I3_the_quota_admits_a_shard_and_refuses_the_full_model(
    nats: NatsServer, tmp_path: Path, fresh: Fresh
) -> None:
    async with (
        on_node(nats, tmp_path, fresh("parts")) as node,
        node.storage(SHOAL_MAX_STORAGE_BYTES=str(FIRST_BYTES)),
    ):
        await bring_in(node, [0, 2], FIRST)
        with pytest.raises(QuotaExceeded) as refused:
            await node.reserve(MODEL.manifest)
        assert refused.value.details["needed_bytes"] == MODEL.sealed.size_bytes - FIRST_BYTES
        with pytest.raises(QuotaExceeded):
            await reserve(node, [[0, 4]])
        disk = await node.storage_state()
        assert (disk.reserved_bytes, disk.used_bytes) == (0, FIRST_BYTES)


async def test_I3_a_shard_counts_once_when_its_blob_comes_complete(
    nats: NatsServer, tmp_path: Path, fresh: Fresh
) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node:
        async with node.storage(), node.fetcher():
            state = await bring_in(node, [0, 2], FIRST)
            assert set((await node.reserve(TWIN.manifest)).missing) == {BLOB}
            disk = await node.storage_state()
            assert (disk.used_bytes, disk.reserved_bytes) == (FIRST_BYTES, len(WEIGHTS) - 3 * LEAF_BYTES)
            arrive(node, [[3, LEAVES]])
            await node.commit(BLOB)
            await node.seal(TWIN.sealed)
            disk = await node.storage_state()
            assert (disk.used_bytes, disk.reserved_bytes) == (len(WEIGHTS) + 2, 0)
            assert await published_shard(node) == state, "as much as its layers need"
            leased = await lease(node, [0, 2])
            assert (Path(leased.view) / "model.safetensors").read_bytes() == WEIGHTS
            assert (await node.delete(TWIN.name)).ok
            assert await published_shard(node) == state
        async with node.storage(), node.fetcher():
            assert await published_shard(node) == state
            disk = await node.storage_state()
            assert (disk.used_bytes, disk.reserved_bytes) == (len(WEIGHTS) + 2, 0), "a blob goes whole or not at all"
            await lease(node, [0, 2])
            await node.ask("release_lease", ReleaseLease(id=leased.id), Empty)


async def test_I3_two_shards_that_share_a_blob_count_it_once(nats: NatsServer, tmp_path: Path, fresh: Fresh) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node, node.storage(), node.fetcher():
        await bring_in(node, [0, 2], FIRST)
        reserving = Reserve(manifest=TWIN.manifest, leaf_ranges={BLOB: SECOND})
        assert (await node.ask("reserve", reserving, ReserveResult)).missing == [BLOB]
        arrive(node, [[6, 8]])
        sealing = SealShard(
            manifest=TWIN.sealed,
            layers=[[2, 3]],
            leaf_ranges={BLOB: SECOND},
            leaf_list_digests={BLOB: hash_leaf_list(leaf_list())},
        )
        twin = await node.ask("seal_shard", sealing, ShardState)
        assert twin.size_bytes == 2 * LEAF_BYTES + LAST_BYTES
        disk = await node.storage_state()
        assert (disk.used_bytes, disk.reserved_bytes) == (4 * LEAF_BYTES + LAST_BYTES + 2, 0)
        assert (await node.delete(MODEL.name)).ok
        assert await published_shard(node) is None
        disk = await node.storage_state()
        # Leaves that nothing needs any more stay in a file whose other leaves are needed, and count.
        assert disk.used_bytes == twin.size_bytes
        assert disk.used_bytes + disk.reserved_bytes == 4 * LEAF_BYTES + LAST_BYTES
        leased = await node.ask("lease", AcquireLease(model=TWIN.name, holder="a test", layers=[2, 3]), LeaseGrant)
        assert (Path(leased.view) / "model.safetensors").read_bytes()[6 * LEAF_BYTES :] == WEIGHTS[6 * LEAF_BYTES :]


LEAF_SETS = st.integers(0, (1 << LEAVES) - 1)


@given(st.dictionaries(st.sampled_from(["org/a", "org/b", "org/c"]), st.tuples(LEAF_SETS, LEAF_SETS), min_size=1))
def test_I3_used_plus_reserved_is_what_may_come_to_the_disk(
    models: dict[str, tuple[int, int]],
) -> None:
    """Each model has a shard with leaves of a blob, and needs leaves of it that are missing."""
    size_bytes = len(WEIGHTS)
    here = wanted = 0
    parts, asked = {}, {}
    for repo, (own, more) in models.items():
        manifest = Manifest(repo=repo, commit="0" * 40, files=[])
        parts[manifest.model] = Shard(manifest, [[0, 1]], {BLOB: own})
        asked[manifest.model] = own | more
        here, wanted = here | own, wanted | own | more
    partial = PartialBlobInfo(size_bytes, leaf_set.byte_count(here, size_bytes), set(asked), asked, here)
    ledger = build_ledger(partials={BLOB: partial}, shards=parts.values())
    assert ledger.used_bytes == leaf_set.byte_count(here, size_bytes)
    assert ledger.reserved_bytes == leaf_set.byte_count(wanted & ~here, size_bytes)
    assert ledger.arrivals.in_flight_bytes == ledger.reserved_bytes


async def test_I3_a_shard_on_a_second_volume_follows_that_volume(
    nats: NatsServer, tmp_path: Path, fresh: Fresh
) -> None:
    async with machine(nats, fresh("parts"), tmp_path) as m, m.node.storage():
        node = m.node
        await node.bring_in(FILLS_THE_STORE)
        with pytest.raises(QuotaExceeded):
            await reserve(node, FIRST)
        await m.configure(m.volume)
        await reserve(node, FIRST)
        (root,) = (await node.storage_state()).volumes
        assert (root.used_bytes, root.reserved_bytes) == (0, 3 * LEAF_BYTES), (
            "its config.json is the other model's too"
        )
        state = await bring_in(node, [0, 2], FIRST)
        assert node.layout.partial(BLOB).resolve().is_relative_to(m.volume)
        (root,) = (await node.storage_state()).volumes
        assert (root.used_bytes, root.reserved_bytes) == (3 * LEAF_BYTES, 0)
        leased = await lease(node, [0, 2])
        with (Path(leased.view) / "model.safetensors").open("rb") as f:
            assert f.read(3 * LEAF_BYTES) == WEIGHTS[: 3 * LEAF_BYTES]
        await node.ask("release_lease", ReleaseLease(id=leased.id), Empty)
        m.disk.unmount()

        async def unpublished() -> bool:
            return await published_shard(node) is None

        await eventually(unpublished, "the part is told of no more", WAIT_TIMEOUT_S)
        assert (await node.storage_state()).used_bytes == FILLS_THE_STORE.sealed.size_bytes
        m.disk.mount()

        async def is_back() -> bool:
            return bool((await node.storage_state()).volumes[0].reserved_bytes)

        await eventually(is_back, "its leaves are counted again", WAIT_TIMEOUT_S)
        assert set((await reserve(node, FIRST)).missing) == {BLOB}
        assert await seal(node, [0, 2], FIRST) == state, "nothing of it had to come again"
        await complete(node)
        m.check(MODEL, FILLS_THE_STORE)
        assert await published_shard(node) is None
        (root,) = (await node.storage_state()).volumes
        assert (root.used_bytes, root.reserved_bytes) == (len(WEIGHTS), 0)
