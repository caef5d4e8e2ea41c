"""Shards as the fetcher and inference use them: counted, kept, leased, completed, deleted."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from shoal_common.errors import Corrupt, InUse, NotFound, QuotaExceeded
from shoal_common.messages.envelope import Empty
from shoal_common.messages.leases import ReleaseLease
from shoal_common.messages.storage import CollectGarbage, Pin
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.waiting import eventually
from tests.storage.running_storage import WAIT_TIMEOUT_S, on_node
from tests.storage.shard_fixtures import (
    BLOB,
    CONFIG,
    FIRST,
    FIRST_BYTES,
    LAST_BYTES,
    MODEL,
    SECOND,
    WEIGHTS,
    arrive,
    bring_in,
    complete,
    lease,
    published_shard,
    reserve,
    seal,
)
from tests.storage.store_fixtures import Model


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
