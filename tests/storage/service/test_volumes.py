"""Volumes on disks of their own: filled, unmounted, mounted again, removed from the settings, refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shoal_common.errors import QuotaExceeded
from shoal_common.messages.storage import CollectGarbage, Configure, Verify, VolumeState
from shoal_common.store.blob_lookup import find_blob, open_blob
from shoal_common.store.store_paths import StorePaths
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.tiny_filesystem import LoopDisk, fill, loop_disk, small_disk
from tests.storage.lease_fixtures import holder_of
from tests.storage.library_fixtures import snapshot_tree
from tests.storage.running_storage import Node, on_node
from tests.storage.store_fixtures import Model, check_invariants, put

MIB = 1 << 20
DEADLINE_S = 60.0
DISK_BYTES = 32 * MIB
SMALL_BYTES = 6 * MIB
FIRST = Model("org/first", {"weights.bin": b"f" * 4 * MIB, "config.json": b"{}"})
SECOND = Model("org/second", {"weights.bin": b"s" * 4 * MIB, "config.json": b'{"a": 1}'})
WEIGHTS = SECOND.sealed.files[0].sha256


async def wait_until(poll: Callable[[], Awaitable[bool]], what: str) -> None:
    """Return once it is so."""
    give_up_s = time.monotonic() + DEADLINE_S
    while not await poll():
        assert time.monotonic() < give_up_s, what
        await asyncio.sleep(0.05)


class Machine:
    """A node whose store is on a small disk, and a second disk."""

    def __init__(self, node: Node, disk: LoopDisk) -> None:
        self.node, self.disk, self.volume = node, disk, disk.at / "shoal"

    async def configure(self, *volumes: Path) -> None:
        """Set the volumes."""
        outcome = await self.node.set_directories(volumes=volumes)
        assert outcome.ok, outcome.error

    async def refused(self, *volumes: Path, code: str = "bad_input") -> str:
        """The refusal of volumes that cannot be used."""
        before = await self.state()
        outcome = await self.node.set_directories(volumes=volumes)
        assert outcome.error is not None and outcome.error.code == code, outcome
        assert await self.state() == before
        return outcome.error.message

    async def state(self) -> list[VolumeState]:
        """The published state of the volumes."""
        return [
            VolumeState(path=r.path, error=r.error, used_bytes=r.used_bytes, duplicate_bytes=r.duplicate_bytes)
            for r in (await self.node.storage_state()).volumes
        ]

    async def is_offered(self, model: Model) -> bool:
        """Whether a model of this node is published."""
        return await self.node.model_state(model) is not None

    async def wait_offered(self, model: Model, offered: bool) -> None:
        """Wait for that."""

        async def matches() -> bool:
            return await self.is_offered(model) == offered

        await wait_until(matches, f"{model.name} is {'' if offered else 'no longer '}offered")

    def check(self, *models: Model) -> None:
        """Whether these models can be read, byte for byte, as inference and peers read them."""
        layout = self.node.layout
        for model in models:
            view = layout.view(model.sealed.model)
            assert all((view / path).read_bytes() == data for path, data in model.bytes.items())
            for f in model.sealed.files:
                with open_blob(layout, f.sha256) as blob:
                    assert blob.read() == model.bytes[f.path]


@asynccontextmanager
async def machine(nats: NatsServer, name: str, tmp_path: Path) -> AsyncIterator[Machine]:
    """A node with a store for one model of the two, and a disk for more."""
    async with on_node(nats, tmp_path, name) as node, node.fetcher():
        with small_disk(node.layout.root, SMALL_BYTES), loop_disk(tmp_path / "big", DISK_BYTES) as disk:
            yield Machine(node, disk)
            if disk.at.is_mount():
                check_invariants(node.layout.root, volume=disk.at / "shoal")


async def test_what_does_not_fit_the_store_goes_to_the_second_volume(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with machine(nats, fresh("roots"), tmp_path) as m, m.node.storage() as process:
        await m.node.bring_in(FIRST)
        with pytest.raises(QuotaExceeded):
            await m.node.reserve(SECOND.manifest)
        await m.configure(m.volume)
        await m.node.bring_in(SECOND)
        assert find_blob(m.node.layout, WEIGHTS).is_relative_to(m.volume)
        assert (m.node.layout.view(SECOND.sealed.model) / "weights.bin").is_symlink()
        m.check(FIRST, SECOND)
        lease = await m.node.lease("org/second")
        assert (Path(lease.view) / "weights.bin").read_bytes() == SECOND.bytes["weights.bin"]
        with holder_of(lease.lock):
            refused = await m.node.delete("org/second")
            assert refused.error is not None and refused.error.code == "in_use"
        await m.node.unlease(lease.id)
        verified = await m.node.command("verify", Verify())
        assert verified.ok and verified.result["corrupt"] == [] and verified.result["checked"] == 4
        (root,) = (await m.node.storage_state()).volumes
        assert (root.used_bytes, root.blob_count, root.error) == (SECOND.manifest.size_bytes, 2, "")
        assert 0 < root.free_bytes < DISK_BYTES
        await process.kill()
        async with m.node.storage():
            await m.wait_offered(SECOND, True)
            m.check(FIRST, SECOND)
            deleted = await m.node.delete("org/second")
            assert deleted.ok and deleted.result["freed_bytes"] == SECOND.manifest.size_bytes
            assert not list(StorePaths(m.volume).blobs.rglob("*"))


async def test_an_unmounted_volume_takes_its_models_and_returns_them(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with machine(nats, fresh("roots"), tmp_path) as m:
        async with m.node.storage() as process:
            await m.configure(m.volume)
            await m.node.bring_in(FIRST)
            await m.node.bring_in(SECOND)
            m.disk.unmount()
            await m.wait_offered(SECOND, False)
            assert await m.is_offered(FIRST)

            async def error_published() -> bool:
                return [r.error for r in await m.state()] == ["it is not mounted: mount its disk"]

            await wait_until(error_published, "the disk is said to be away")
            # Two are too many for the store alone; nothing is written under the mount point.
            with pytest.raises(QuotaExceeded):
                await m.node.reserve(SECOND.manifest)
            outcome = await m.node.command("configure", Configure(partial_retention_s=1))
            assert outcome.ok, "other settings can be changed without it"
            assert not list(m.disk.at.iterdir()), "something was written to an empty mount point"
            m.disk.mount()
            await m.wait_offered(SECOND, True)
            m.check(FIRST, SECOND)
            m.disk.unmount()
            await m.wait_offered(SECOND, False)
            await process.kill()
        async with m.node.storage() as process:  # a start without it
            assert await m.is_offered(FIRST) and not await m.is_offered(SECOND)
            assert not list(m.disk.at.iterdir())
            m.disk.mount()
            await m.wait_offered(SECOND, True)
            m.check(FIRST, SECOND)
            assert "copied-in" not in process.output, "what came back was hashed again"


async def test_a_blob_pulled_again_during_an_unmount_is_removed_by_gc(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with machine(nats, fresh("roots"), tmp_path) as m, m.node.storage():
        await m.configure(m.volume)
        await m.node.bring_in(FIRST)
        await m.node.bring_in(SECOND)
        m.disk.unmount()
        await m.wait_offered(SECOND, False)
        await m.node.delete("org/first")
        await m.node.bring_in(SECOND)
        m.check(SECOND)
        m.disk.mount()

        async def twice() -> bool:
            return [r.duplicate_bytes for r in await m.state()] == [SECOND.manifest.size_bytes]

        await wait_until(twice, "the copies are counted")
        assert (await m.node.storage_state()).used_bytes == 2 * SECOND.manifest.size_bytes
        outcome = await m.node.command("gc", CollectGarbage())
        assert outcome.ok and outcome.result["freed_bytes"] == SECOND.manifest.size_bytes, outcome
        assert (await m.node.storage_state()).used_bytes == SECOND.manifest.size_bytes
        m.check(SECOND)
        assert not list(StorePaths(m.volume).blobs.rglob("*"))


async def test_a_removed_volume_keeps_its_files_and_returns_with_them(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with machine(nats, fresh("roots"), tmp_path) as m, m.node.storage():
        await m.configure(m.volume)
        await m.node.bring_in(FIRST)
        await m.node.bring_in(SECOND)
        before = snapshot_tree(m.volume)
        await m.configure()
        assert not await m.is_offered(SECOND) and await m.is_offered(FIRST)
        assert await m.state() == [] and snapshot_tree(m.volume) == before
        assert not list((m.node.layout.root / "volumes").iterdir())
        await m.configure(m.volume)
        await m.wait_offered(SECOND, True)
        m.check(FIRST, SECOND)


async def test_eviction_frees_the_disk_that_the_blob_comes_to(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    large = [Model(f"org/large-{n}", {"weights.bin": bytes([65 + n]) * 9 * MIB}) for n in range(3)]
    async with machine(nats, fresh("roots"), tmp_path) as m, m.node.storage(SHOAL_EVICTION_POLICY="lru"):
        await m.configure(m.volume)
        await m.node.bring_in(FIRST)  # in the store, least recently used: no help for what does not fit there
        await m.node.bring_in(large[0])
        await m.node.bring_in(large[1])
        planned = await m.node.plan(large[2].manifest.size_bytes)
        assert [v.model for v in planned.victims] == [large[0].name]
        evicted = (await m.node.reserve(large[2].manifest)).evicted
        assert evicted is not None and evicted.victims == planned.victims
        blob = next(iter(large[2].blobs))
        put(m.node.layout, blob, large[2].blobs[blob])
        await m.node.commit(blob)
        await m.node.seal(large[2].sealed)
        m.check(FIRST, large[1], large[2])


async def test_a_full_second_volume_is_reported_and_keeps_its_partial(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with machine(nats, fresh("roots"), tmp_path) as m, m.node.storage(SHOAL_BALLAST_BYTES="0"):
        await m.node.bring_in(FIRST)
        await m.configure(m.volume)
        await m.node.reserve(SECOND.manifest)
        ballast = fill(m.disk.at)
        room = await m.node.ask_room(SECOND.name)
        assert not room.enough and room.volume == str(m.volume) and room.free_bytes == 0
        ballast.unlink()
        assert (await m.node.ask_room(SECOND.name)).enough
        await m.node.bring_in(SECOND)


async def test_impossible_volumes_are_refused_with_the_reason(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with machine(nats, fresh("roots"), tmp_path) as m, m.node.storage():
        m.disk.unmount()
        assert "mount its disk" in await m.refused(m.disk.at / "x" / "y")
        m.disk.mount()
        assert "overlap" in await m.refused(m.node.layout.root / "inside")
        assert "overlap" in await m.refused(m.disk.at / "a", m.disk.at / "a" / "b")
        assert "the same file system as" in await m.refused(m.disk.at / "a", m.disk.at / "b")
        (m.disk.at / "models").mkdir()
        inside, around = m.disk.at / "models" / "x", m.disk.at / "models"
        outcome = await m.node.set_directories(volumes=[inside], libraries=[around])
        assert outcome.error is not None and "the library" in outcome.error.message
        (m.disk.at / "VERSION").write_text("1")
        assert "is a store" in await m.refused(m.disk.at)
        (m.disk.at / "VERSION").unlink()
        await m.configure(m.volume)
        async with machine(nats, fresh("other"), tmp_path / "other") as other, other.node.storage():
            message = await other.refused(m.volume, code="already_running")
            assert str(m.node.layout.root) in message, "the holder is named"


async def test_a_volume_on_the_stores_own_disk_is_refused(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with on_node(nats, tmp_path, fresh("roots")) as node:
        here = tmp_path / "unmounted"
        here.mkdir()
        async with node.storage():
            outcome = await node.set_directories(volumes=[here])
            assert outcome.error is not None and "the same file system as the store" in outcome.error.message
        async with node.storage(SHOAL_VOLUMES=str(here)):
            (root,) = (await node.storage_state()).volumes
            assert "the same file system as the store" in root.error
            await node.bring_in(FIRST)
        assert not list(here.iterdir())
