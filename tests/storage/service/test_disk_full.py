"""A full disk: what frees space works on it, the ballast file is freed for it, and one eviction is tried."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import DiskFull, ShoalError
from shoal_common.messages.envelope import Empty
from shoal_common.messages.storage import CheckSpace, CollectGarbage, Reserve
from shoal_common.names import ModelId
from shoal_common.settings.node import StorageSettings
from shoal_common.store.ballast import BallastFile, next_step
from shoal_common.store.disk_full import map_disk_full
from shoal_common.store.verification_stamp import write_stamp
from shoal_storage.eviction import executor as room_module
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.harness.tiny_filesystem import fill, fill_more, free_bytes, small_disk
from tests.harness.waiting import eventually
from tests.storage.running_storage import on_node
from tests.storage.service.test_eviction_races import A, B, C, model_of
from tests.storage.storage_parts import storage_parts
from tests.storage.store_fixtures import Model, StoreFixture, check_invariants, put, sha256

DISK_BYTES, FILES = 8 << 20, 64
MIB = 1 << 20
SIZES = st.integers(0, 1000)

OLD = Model("org/old", {"weights.bin": b"o" * (2 * MIB)})
GOES = Model("org/goes", {"weights.bin": b"g" * MIB})
NEW = Model("org/new", {"weights.bin": b"n" * (MIB // 2)})


async def wait_free(disk: Path, size_bytes: int) -> None:
    """Wait until this much is free: a deleted file keeps its space until the verifier has read it."""

    async def is_free() -> bool | None:
        return free_bytes(disk) >= size_bytes or None

    await eventually(is_free, f"{size_bytes} free bytes")


# The ballast file


@given(st.booleans(), st.integers(0, 100), SIZES, SIZES, SIZES)
def test_I3_ballast_is_made_only_from_spare_space_and_released(
    there: bool, size: int, free: int, headroom: int, in_flight: int
) -> None:
    step = next_step(size if there else 0, size, free, headroom, in_flight)
    if step == "make":
        assert not there and free - size - headroom - in_flight >= 3 * size > 0
        assert next_step(size, size, free - size, headroom, in_flight) == "leave", "made and at once given up"
    if step == "give up":
        assert there and (free == 0 or free < in_flight)
    if there and size and (free == 0 or free < in_flight):
        assert step == "give up"


def test_ballast_that_is_no_longer_configured_is_released() -> None:
    assert next_step(64, 0, 10_000, 0, 0) == "give up"


def test_ballast_is_really_allocated_found_again_and_released(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES, FILES) as disk:
        before = free_bytes(disk)
        reserve = BallastFile(disk / "ballast", 2 * MIB)
        reserve.make()
        assert before - free_bytes(disk) == reserve.held_bytes == 2 * MIB
        (disk / ".ballast.new").write_bytes(b"half of one")
        later = BallastFile(disk / "ballast", 2 * MIB)
        later.read_size()
        assert later.held_bytes == 2 * MIB and not (disk / ".ballast.new").exists()
        fill(disk)
        assert later.release() == 2 * MIB == free_bytes(disk)
        assert later.release() == 0 and not (disk / "ballast").exists()


def test_ballast_that_does_not_fit_leaves_no_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES, FILES) as disk:
        before = free_bytes(disk)
        with pytest.raises(OSError, match="No space left"):
            BallastFile(disk / "ballast", 2 * DISK_BYTES).make()
        assert list(disk.iterdir()) == [] and free_bytes(disk) == before


def test_where_fallocate_does_not_work_ballast_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    reserve = BallastFile(tmp_path / "ballast", 2 * MIB + 5)
    reserve.make()
    assert (tmp_path / "ballast").stat().st_size == 2 * MIB + 5


# At 0 bytes free


@pytest.mark.parametrize("ballast_bytes", [0, MIB // 2])
async def test_I6_at_0_bytes_free_every_path_that_frees_space_works(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, ballast_bytes: int
) -> None:
    environ = {"SHOAL_BALLAST_BYTES": str(ballast_bytes), "SHOAL_EVICTION_POLICY": "lru"}
    async with on_node(nats, tmp_path, fresh("storage")) as node, node.fetcher():
        with small_disk(node.layout.root, DISK_BYTES, FILES) as disk:
            async with node.storage(**environ) as process:
                await node.bring_in(OLD)
                await node.bring_in(GOES)
                stray = b"nobody needs this" * 10_000
                path = node.layout.blob(sha256(stray))
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(stray)
                assert write_stamp(path.name, path)
                await process.kill()
            assert (disk / "ballast").exists() == bool(ballast_bytes)
            ballast = fill(disk)
            async with node.storage(**environ) as process:
                if ballast_bytes:
                    await process.wait_line("ballast given up")
                    fill_more(ballast)
                else:
                    await process.wait_line("disk full: nothing can arrive")
                assert free_bytes(disk) == 0
                outcome = await node.command("gc", CollectGarbage())
                assert outcome.ok and outcome.result["freed_bytes"] == len(stray), outcome.error
                await wait_free(disk, len(stray))
                fill_more(ballast)
                outcome = await node.delete("org/goes")
                assert outcome.ok and outcome.result["freed_bytes"] == MIB, outcome.error
                await wait_free(disk, MIB)
                fill_more(ballast)
                reserved = await node.reserve(NEW.manifest)  # which only an eviction can make space for
                assert reserved.evicted is not None and [v.model for v in reserved.evicted.victims] == [OLD.name]
                fill_more(ballast)
                await node.release(NEW.manifest)
                assert (await node.storage_state()).reserved_bytes == 0
                ballast.unlink()
                await node.bring_in(NEW)
                check_invariants(disk)
                await process.kill()


async def test_at_0_bytes_free_a_share_in_a_partial_can_be_given_back(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    """Partial-blob owners are in memory only then: there is no space for the file that records them."""
    one, other = (Model(f"org/{n}", {"shared.bin": b"s" * MIB, "own.bin": n.encode() * 5000}) for n in ("one", "two"))
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        with small_disk(node.layout.root, DISK_BYTES, FILES) as disk:
            async with node.storage() as process:
                await node.reserve(one.manifest)
                await node.reserve(other.manifest)
                put(node.layout, next(iter(one.blobs)), b"s" * MIB)
                ballast = fill(disk)
                await node.release(one.manifest)
                assert (await node.storage_state()).reserved_bytes == other.manifest.size_bytes
                fill_more(ballast)
                await node.release(other.manifest)
                assert (await node.storage_state()).reserved_bytes == 0
                await wait_free(disk, MIB)
                await process.kill()


def test_a_commit_the_disk_refuses_leaves_a_writable_partial(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreFixture(root)
    (blob,) = store.reserve(GOES)
    put(store.layout, blob, GOES.blobs[blob])
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.name == "data":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            store.commit(blob)
    assert (store.layout.partial(blob) / "data").stat().st_mode & 0o200
    store.commit(blob)


# Reported, and tried again


def test_only_a_full_disk_is_called_one() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(DiskFull, match="while storage tried to seal"), map_disk_full("storage tried to seal"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="Input/output") as e, map_disk_full("storage tried to seal"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(e.value, ShoalError)


async def test_ballast_is_released_for_what_storage_must_write(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(None, 0)) as parts:
        parts.disk.ballast.size_bytes = MIB
        parts.disk.ballast.make()
        asked: list[bool] = []

        async def answer(_: Empty) -> Empty:
            asked.append((parts.disk.layout.root / "ballast").exists())
            if parts.disk.ballast.held_bytes or len(asked) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return Empty()

        guarded = parts.disk_full.with_disk_full_retry("commit", answer)
        assert await guarded(Empty()) == Empty() and asked == [True, False]
        with pytest.raises(DiskFull, match="disk full: No space left on device while storage tried to commit"):
            await guarded(Empty())
        assert asked == [True, False, False], "there was nothing more to give up"


# Space for downloads under way


async def test_concurrent_blocked_downloads_cost_one_eviction_plan(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room_module, "_FREED_DEADLINE_S", 0.2)
    first, second = model_of("first", 700), model_of("second", 200)
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(None, 0, "lru")) as parts:
        await parts.bring_in(A, B, C)
        for model in (first, second):
            await parts.fetch.reserve(Reserve(manifest=model.manifest))
        full = parts.disk_full
        parts.disk.claims_free_bytes = 100  # others have taken the rest, and A's file is open somewhere
        answers = await asyncio.gather(*(full.check_space(CheckSpace(model=m.name)) for m in (first, second, first)))
        assert [a.enough for a in answers] == [False] * 3
        assert [v.model for a in answers if a.evicted for v in a.evicted.victims] == [A.name]
        assert parts.ledger.manifests.keys() == {B.name, C.name}
        assert (answers[0].lacking_bytes, answers[0].free_bytes, answers[0].volume) == (800, 100, "")
        assert (answers[0].lacking_bytes, answers[0].free_bytes) == (800, 100)
        parts.disk.claims_free_bytes = 1100
        assert (await full.check_space(CheckSpace(model=second.name))).enough
        parts.disk.claims_free_bytes = 0  # a later time: a new plan
        again = await full.check_space(CheckSpace(model=second.name))
        assert again.evicted is not None and [v.model for v in again.evicted.victims] == [B.name]


@pytest.mark.parametrize(("policy", "need"), [("manual", 500), ("lru", 5000)])
async def test_no_model_is_evicted_for_a_blocked_download_in_vain(
    nats: NatsServer, fresh: Fresh, tmp_path: Path, policy: str, need: int
) -> None:
    limits = StorageSettings(None, 0, "lru" if policy == "lru" else "manual")
    async with storage_parts(nats, tmp_path, fresh("storage"), limits) as parts:
        await parts.bring_in(A, B, C)
        comes = model_of("comes", need)
        await parts.fetch.reserve(Reserve(manifest=comes.manifest))
        parts.disk.claims_free_bytes = 0
        answer = await parts.disk_full.check_space(CheckSpace(model=comes.name))
        assert not answer.enough and answer.evicted is None and answer.lacking_bytes == need
        assert parts.ledger.manifests.keys() == {A.name, B.name, C.name}


async def test_I3_there_is_space_only_when_the_headroom_stays_free(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(None, 300)) as parts:
        comes = model_of("comes", 500)
        await parts.fetch.reserve(Reserve(manifest=comes.manifest))
        for free, enough in ((0, False), (500, False), (799, False), (800, True)):
            parts.disk.claims_free_bytes = free
            assert (await parts.disk_full.check_space(CheckSpace(model=comes.name))).enough == enough, free


async def test_I10_a_space_request_is_for_a_models_name_only(nats: NatsServer, fresh: Fresh, tmp_path: Path) -> None:
    async with storage_parts(nats, tmp_path, fresh("storage"), StorageSettings(None, 0)) as parts:
        with pytest.raises(ShoalError, match="is not a model"):
            await parts.disk_full.check_space(CheckSpace(model=ModelId("../up")))
