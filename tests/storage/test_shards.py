"""Shards as the fetcher and inference use them: counted, kept, leased, completed, deleted."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.bus.keys import shard_key
from shoal_common.errors import Corrupt, InUse, NotFound, QuotaExceeded
from shoal_common.messages.envelope import Empty
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import CollectGarbage, Pin, Reserve, ReserveResult, SealShard, ShardState
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_hash
from shoal_storage.ledger.entries import PartialBlobInfo, Shard
from shoal_storage.ledger.ledger import Ledger
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.running_storage import WAIT_TIMEOUT_S, Node, on_node
from tests.storage.store_fixtures import Model, sha256
from tests.storage.test_volumes import FIRST as FILLS_THE_STORE
from tests.storage.test_volumes import machine

Fresh = Callable[[str], str]
LEAVES = 8
LAST_BYTES = 70_000
"""The size of the last leaf."""
WEIGHTS = b"".join(bytes([65 + n]) * LEAF_BYTES for n in range(LEAVES - 1)) + b"e" * LAST_BYTES
MODEL = Model("org/large", {"config.json": b"{}", "model.safetensors": WEIGHTS, "unneeded.bin": b"u" * 5000})
TWIN = Model("org/twin", {"model.safetensors": WEIGHTS})
"""Another model with the same weights."""
BLOB, CONFIG, UNNEEDED = sha256(WEIGHTS), sha256(b"{}"), sha256(b"u" * 5000)
FIRST, SECOND = [[0, 3]], [[2, 3], [6, 8]]
"""The leaves of layers 0 to 1, and of layer 2."""
FIRST_BYTES = 3 * LEAF_BYTES + 2


async def reserve(node: Node, leaves: list[list[int]]) -> ReserveResult:
    """Reserve leaves of the weights, the small files, and nothing of the file that no stage needs."""
    asked = {BLOB: leaves, UNNEEDED: []}
    return await node.ask("reserve", Reserve(manifest=MODEL.manifest, leaf_ranges=asked), ReserveResult)


def arrive(node: Node, leaves: list[list[int]], data: bytes = WEIGHTS) -> None:
    """Write leaves to their places, the bitmap, and the list beside them, as the fetcher does."""
    directory = node.layout.partial(BLOB)
    bitmap = Bitmap(len(data), (directory / "have").read_bytes() if (directory / "have").exists() else b"")
    with (directory / "data").open("r+b") as f:
        for first, last in leaves:
            f.seek(first * LEAF_BYTES)
            f.write(data[first * LEAF_BYTES : last * LEAF_BYTES])
            for leaf in range(first, last):
                bitmap.add(leaf)
    (directory / "have").write_bytes(bitmap.to_bytes())
    (directory / "leaves").write_bytes(leaf_list())


def leaf_list() -> bytes:
    return b"".join(leaf_hash(WEIGHTS[n * LEAF_BYTES : (n + 1) * LEAF_BYTES]) for n in range(LEAVES))


async def seal(node: Node, layers: list[int], leaves: list[list[int]], root: str = "") -> ShardState:
    asked = {BLOB: leaves, UNNEEDED: []}
    digests = {BLOB: root or hash_leaf_list(leaf_list())}
    question = SealShard(manifest=MODEL.sealed, layers=[layers], leaf_ranges=asked, leaf_list_digests=digests)
    return await node.ask("seal_shard", question, ShardState)


async def bring_in(node: Node, layers: list[int], leaves: list[list[int]]) -> ShardState:
    """Download and seal a shard."""
    for blob in (await reserve(node, leaves)).missing:
        if blob == BLOB:
            arrive(node, leaves)
        else:
            (node.layout.partial(blob) / "data").write_bytes(MODEL.blobs[blob])
            await node.commit(blob)
    return await seal(node, layers, leaves)


async def complete(node: Node) -> None:
    """Download the complete model after a shard: what is present stays, the rest is downloaded."""
    assert set((await node.reserve(MODEL.manifest)).missing) == {BLOB, UNNEEDED}
    arrive(node, [[3, LEAVES]])
    (node.layout.partial(UNNEEDED) / "data").write_bytes(MODEL.blobs[UNNEEDED])
    for blob in (BLOB, UNNEEDED):
        await node.commit(blob)
    await node.seal(MODEL.sealed)


async def published_shard(node: Node) -> ShardState | None:
    return await node.here.buckets.state.get_as(shard_key(node.node, MODEL.name), ShardState)


async def lease(node: Node, layers: list[int]) -> LeaseGrant:
    return await node.ask("lease", AcquireLease(model=MODEL.name, holder="a test", layers=layers), LeaseGrant)


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


async def test_other_layers_extend_the_shard_and_a_restart_keeps_it(
    nats: NatsServer, tmp_path: Path, fresh: Fresh
) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node:
        async with node.storage():
            await bring_in(node, [0, 2], FIRST)
            await reserve(node, SECOND)
            assert (await node.storage_state()).reserved_bytes == LEAF_BYTES + LAST_BYTES
            arrive(node, [[6, 8]])
            state = await seal(node, [2, 3], SECOND)
            assert state.layers == [[0, 3]] and state.size_bytes == 4 * LEAF_BYTES + LAST_BYTES + 2
        async with node.storage():
            assert await published_shard(node) == state
            disk = await node.storage_state()
            assert (disk.reserved_bytes, disk.used_bytes) == (0, state.size_bytes)
            leased = await lease(node, [1, 3])
            assert leased.leaf_ranges == {"model.safetensors": [[0, 3], [6, 8]]}


async def test_I4_a_lease_views_the_shard_and_protects_it(nats: NatsServer, tmp_path: Path, fresh: Fresh) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node:
        async with node.storage(), node.fetcher():
            await bring_in(node, [0, 2], FIRST)
            with pytest.raises(NotFound, match=r"layers \[1, 3\]"):
                await lease(node, [1, 3])
            with pytest.raises(NotFound):
                await node.lease(MODEL.name)
            leased = await lease(node, [0, 2])
            weights = Path(leased.view) / "model.safetensors"
            assert weights.stat().st_size == len(WEIGHTS), "who loads from it checks its length"
            assert weights.read_bytes()[: 3 * LEAF_BYTES] == WEIGHTS[: 3 * LEAF_BYTES]
            assert not (Path(leased.view) / "unneeded.bin").exists() and (Path(leased.view) / "config.json").exists()
            fd = os.open(leased.lock, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                await node.command("gc", CollectGarbage())
                await node.release(MODEL.manifest)
                outcome = await node.delete(MODEL.name)
                assert not outcome.ok and outcome.error is not None and outcome.error.code == InUse.code
                assert weights.read_bytes()[: 3 * LEAF_BYTES] == WEIGHTS[: 3 * LEAF_BYTES]
                assert await published_shard(node) is not None
            finally:
                os.close(fd)
            assert (await node.delete(MODEL.name)).ok
            assert await published_shard(node) is None
            assert list(node.layout.partials.iterdir()) == [] and list(node.layout.shards.iterdir()) == []
            disk = await node.storage_state()
            assert (disk.reserved_bytes, disk.used_bytes) == (0, 0)
        async with node.storage():
            assert (await node.storage_state()).reserved_bytes == 0


async def test_a_shard_grows_into_the_model_while_it_is_read(nats: NatsServer, tmp_path: Path, fresh: Fresh) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node, node.storage():
        await bring_in(node, [0, 2], FIRST)
        leased = await lease(node, [0, 2])
        with (Path(leased.view) / "model.safetensors").open("rb") as reading:
            await complete(node)
            assert reading.read(LEAF_BYTES) == WEIGHTS[:LEAF_BYTES]
        assert await published_shard(node) is None and await node.model_state(MODEL) is not None
        assert (await node.storage_state()).reserved_bytes == 0
        assert (await lease(node, [0, 2])).leaf_ranges == {}
        assert list(node.layout.shards.iterdir()) == []


async def test_a_released_extension_leaves_the_shard_as_it_was(
    nats: NatsServer, tmp_path: Path, fresh: Fresh
) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node:
        async with node.storage():
            await bring_in(node, [0, 2], FIRST)
            await node.reserve(MODEL.manifest)
            disk = await node.storage_state()
            assert disk.reserved_bytes == len(WEIGHTS) + 5000 - 3 * LEAF_BYTES
            assert disk.used_bytes == FIRST_BYTES
            await node.release(MODEL.manifest)
            assert await published_shard(node) is not None
            await lease(node, [0, 2])
        async with node.storage():
            assert await published_shard(node) is not None


async def test_I1_leaves_unlike_the_sealed_list_are_discarded(nats: NatsServer, tmp_path: Path, fresh: Fresh) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node:
        wrong = WEIGHTS[: 2 * LEAF_BYTES] + b"x" + WEIGHTS[2 * LEAF_BYTES + 1 :]
        async with node.storage():
            for blob in (await reserve(node, FIRST)).missing:
                if blob != BLOB:
                    (node.layout.partial(blob) / "data").write_bytes(MODEL.blobs[blob])
                    await node.commit(blob)
            arrive(node, FIRST, wrong)
            with pytest.raises(NotFound, match="leaf list"):
                await seal(node, [0, 2], FIRST, root="0" * 64)
            with pytest.raises(Corrupt, match="1 of the leaves"):
                await seal(node, [0, 2], FIRST)
            assert await published_shard(node) is None
            with pytest.raises(NotFound):
                await lease(node, [0, 2])
            assert (node.layout.partial(BLOB) / "data").stat().st_size == 0
            with pytest.raises(NotFound, match="leaves are missing"):
                await seal(node, [0, 2], FIRST)
            await bring_in(node, [0, 2], FIRST)


async def test_an_unused_shard_is_evicted_unless_it_is_pinned(nats: NatsServer, tmp_path: Path, fresh: Fresh) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node:
        other = Model("org/other", {"other.bin": b"o" * (2 * LEAF_BYTES)})
        quota = FIRST_BYTES + LEAF_BYTES
        async with node.storage(SHOAL_MAX_STORAGE_BYTES=str(quota), SHOAL_EVICTION_POLICY="lru"):
            await bring_in(node, [0, 2], FIRST)
            assert (await node.command("pin", Pin(model=MODEL.name))).ok
            with pytest.raises(QuotaExceeded):
                await node.reserve(other.manifest)
            assert (await node.command("pin", Pin(model=MODEL.name, pinned=False))).ok
            leased = await lease(node, [0, 2])
            fd = os.open(leased.lock, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)
                with pytest.raises(QuotaExceeded):
                    await node.reserve(other.manifest)
            finally:
                os.close(fd)
            await node.ask("release_lease", ReleaseLease(id=leased.id), Empty)
            evicted = (await node.reserve(other.manifest)).evicted
            assert evicted is not None and [v.model for v in evicted.victims] == [MODEL.name]
            assert evicted.freed_bytes >= FIRST_BYTES, "at least: a file system may have given its file more"
            assert await published_shard(node) is None and not node.layout.partial(BLOB).exists()
            disk = await node.storage_state()
            assert (disk.used_bytes, disk.reserved_bytes) == (0, 2 * LEAF_BYTES)


async def test_I6_a_shard_whose_bytes_are_gone_is_not_published_again(
    nats: NatsServer, tmp_path: Path, fresh: Fresh
) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node:
        async with node.storage():
            await bring_in(node, [0, 2], FIRST)
        (node.layout.partial(BLOB) / "have").unlink()
        async with node.storage():
            assert await published_shard(node) is None
            assert list(node.layout.shards.iterdir()) == []


async def test_I1_a_shard_that_lost_leaves_is_not_leased(nats: NatsServer, tmp_path: Path, fresh: Fresh) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node, node.storage():
        await bring_in(node, [0, 2], FIRST)
        bitmap = Bitmap(len(WEIGHTS))
        bitmap.add(0)
        bitmap.add(2)
        (node.layout.partial(BLOB) / "have").write_bytes(bitmap.to_bytes())
        with pytest.raises(NotFound, match="leaves are missing"):
            await lease(node, [0, 2])
        assert await published_shard(node) is None
        await reserve(node, FIRST)
        disk = await node.storage_state()
        assert (disk.used_bytes, disk.reserved_bytes) == (2, 3 * LEAF_BYTES), "none of it is verified any more"
        arrive(node, [[1, 2]])
        await seal(node, [0, 2], FIRST)
        await lease(node, [0, 2])


async def test_a_shard_with_a_removed_file_is_unpublished(nats: NatsServer, tmp_path: Path, fresh: Fresh) -> None:
    async with on_node(nats, tmp_path, fresh("parts")) as node, node.storage():
        await bring_in(node, [0, 2], FIRST)
        node.layout.blob(CONFIG).unlink()

        async def unpublished() -> bool:
            return await published_shard(node) is None

        async def is_counted() -> bool:
            disk = await node.storage_state()
            return (disk.used_bytes, disk.reserved_bytes) == (0, 3 * LEAF_BYTES)

        await eventually(unpublished, "the part is told of no more", WAIT_TIMEOUT_S)
        await eventually(is_counted, "its leaves stay, for a fetch", WAIT_TIMEOUT_S)
        assert set((await reserve(node, FIRST)).missing) == {BLOB, CONFIG}


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
    for model, (own, more) in models.items():
        parts[model] = Shard(Manifest(repo=model, commit="0" * 40, files=[]), [[0, 1]], {BLOB: own})
        asked[model] = own | more
        here, wanted = here | own, wanted | own | more
    partial = PartialBlobInfo(size_bytes, leaf_set.byte_count(here, size_bytes), set(models), asked, here)
    ledger = Ledger(partials={BLOB: partial}, shards=parts)
    assert ledger.used_bytes == leaf_set.byte_count(here, size_bytes)
    assert ledger.reserved_bytes == leaf_set.byte_count(wanted & ~here, size_bytes)
    assert ledger.in_flight_bytes == ledger.reserved_bytes


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
