"""Writing what arrives: whatever the chunks, whenever it ends, the bitmap claims only what is in the file."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.leaf_set import leaf_ranges
from shoal_common.store.relay_bitmap import read_relay_bitmap
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.errors import ReservationLost
from shoal_fetcher.partials import partial_blob
from shoal_fetcher.partials.bitmap_file import read_bitmap
from shoal_fetcher.partials.blocking import LeafWorkers
from shoal_fetcher.partials.leaf_splitter import LeafSplitter
from shoal_fetcher.partials.partial_blob import PartialBlob

SIZES = st.integers(0, 3 * LEAF_BYTES + 5) | st.sampled_from([0, 1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1])
CUTS = st.lists(st.integers(1, 2 * LEAF_BYTES), min_size=1, max_size=8)


def content(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


BLOB = "ab" * 32


def reserved(root: Path) -> Path:
    """Create a partial blob as storage does, in a store at `root`. Returns its directory."""
    directory = StorePaths(root).partial(BLOB)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data").touch()
    return directory


@asynccontextmanager
async def opened(directory: Path, size_bytes: int) -> AsyncIterator[PartialBlob]:
    """Open it for writing."""
    layout = StorePaths(directory.parent.parent)
    async with LeafWorkers() as workers, PartialBlob(layout, workers, BLOB, size_bytes) as partial:
        yield partial


def missing_runs(partial: PartialBlob) -> list[tuple[int, int]]:
    """Return the missing byte ranges."""
    ends = [
        (a * LEAF_BYTES, min(b * LEAF_BYTES, partial.size_bytes))
        for a, b in leaf_ranges(partial.all_leaves & ~partial.written)
    ]
    return ends


class Source:
    """What a source sends in order, and the result."""

    def __init__(self, partial: PartialBlob) -> None:
        self.partial, self.cutter = partial, LeafSplitter(partial.size_bytes)

    async def write(self, data: bytes) -> None:
        """Add the next bytes."""
        for leaf, whole in self.cutter.feed(data):
            assert await self.partial.write(leaf, whole, trust_hash=True)


async def fill(partial: PartialBlob, data: bytes, cuts: list[int], upto: int | None = None, begin: int = 0) -> Source:
    """Write data from `begin` on, in chunks of these sizes, cyclically."""
    source = Source(partial)
    source.cutter.seek(begin)
    at, end, turn = 0, len(data) if upto is None else upto, 0
    while at < end:
        step = min(cuts[turn % len(cuts)], end - at)
        await source.write(data[at : at + step])
        at, turn = at + step, turn + 1
    return source


def ready_leaves(directory: Path, size_bytes: int) -> set[int]:
    """Return what others may request."""
    bitmap = read_relay_bitmap(StorePaths(directory.parent.parent), BLOB, size_bytes)
    return {leaf for leaf in range(bitmap.leaf_count) if leaf in bitmap}


def claims_only_what_is_there(directory: Path, data: bytes) -> Bitmap:
    """Return the bitmap as the next start reads it, after checking every leaf that it claims."""
    bitmap = read_bitmap(directory, len(data))
    on_disk = (directory / "data").read_bytes()
    for leaf in range(bitmap.leaf_count):
        if leaf in bitmap:
            start, end = leaf * LEAF_BYTES, leaf * LEAF_BYTES + bitmap.leaf_bytes(leaf)
            assert on_disk[start:end] == data[start:end], f"leaf {leaf} is claimed and is not there"
    return bitmap


@settings(max_examples=30, deadline=None)
@given(SIZES, CUTS)
def test_any_chunking_gives_the_same_file_and_the_same_bitmap(size_bytes: int, cuts: list[int]) -> None:
    data = content(size_bytes)

    async def scenario(directory: Path) -> None:
        async with opened(directory, size_bytes) as partial:
            source = await fill(partial, data, cuts)
            assert not source.cutter.has_excess
        assert partial.durable_bytes == size_bytes

    with TemporaryDirectory() as root:
        asyncio.run(scenario(directory := reserved(Path(root))))
        assert (directory / "data").read_bytes() == data
        assert claims_only_what_is_there(directory, data).complete


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3 * LEAF_BYTES + 5), CUTS, st.data())
def test_I6_wherever_it_is_cut_off_it_resumes_with_full_leaves(
    size_bytes: int, cuts: list[int], draw: st.DataObject
) -> None:
    data = content(size_bytes)
    cut_off = draw.draw(st.integers(0, size_bytes))

    async def scenario(directory: Path) -> None:
        with pytest.raises(ConnectionError):
            async with opened(directory, size_bytes) as partial:
                await fill(partial, data, cuts, upto=cut_off)
                raise ConnectionError("the source went away")
        bitmap = claims_only_what_is_there(directory, data)
        whole = cut_off if cut_off == size_bytes else cut_off // LEAF_BYTES * LEAF_BYTES
        assert bitmap.have_bytes == whole == partial.durable_bytes
        async with opened(directory, size_bytes) as partial:
            assert partial.bytes_of(partial.written) == whole
            for start, end in missing_runs(partial):
                await fill(partial, data[start:end], cuts, begin=start)
        assert claims_only_what_is_there(directory, data).complete
        assert (directory / "data").read_bytes() == data

    with TemporaryDirectory() as root:
        asyncio.run(scenario(reserved(Path(root))))


async def test_a_source_that_starts_over_does_not_touch_durable_bytes(tmp_path: Path) -> None:
    data, directory = content(3 * LEAF_BYTES), reserved(tmp_path)
    async with opened(directory, len(data)) as partial:
        await Source(partial).write(data[:LEAF_BYTES])
    async with opened(directory, len(data)) as partial:
        assert not await partial.write(0, b"\0" * LEAF_BYTES, trust_hash=True)
        await fill(partial, data, [LEAF_BYTES])
        assert partial.written == partial.relayable == partial.all_leaves
    assert (directory / "data").read_bytes() == data
    assert partial.durable_bytes == len(data)


async def test_more_bytes_than_the_blob_has_are_not_written(tmp_path: Path) -> None:
    data, directory = content(LEAF_BYTES + 7), reserved(tmp_path)
    async with opened(directory, len(data)) as partial:
        source = await fill(partial, data, [len(data)])
        assert not source.cutter.has_excess
        await source.write(b"x")
        assert source.cutter.has_excess
    assert (directory / "data").read_bytes() == data


async def test_I6_a_crash_between_data_and_bitmap_claims_no_leaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, directory = content(2 * LEAF_BYTES), reserved(tmp_path)

    class Crash(BaseException):
        """The process dies here."""

    real = os.pwrite

    def crash(fd: int, piece: bytes, offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "have":
            raise Crash
        return real(fd, piece, offset)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(os, "pwrite", crash)
        async with opened(directory, len(data)) as partial:
            await fill(partial, data, [len(data)])
    assert (directory / "data").read_bytes() == data
    assert claims_only_what_is_there(directory, data).have_bytes == 0


async def test_I6_leaves_whose_sync_failed_are_never_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, directory = content(2 * LEAF_BYTES), reserved(tmp_path)
    real, tried = os.fsync, asyncio.Event()

    def failing(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(partial_blob, "CHECKPOINT_LEAVES", 1)
    async with opened(directory, len(data)) as partial:
        partial.on_change = tried.set
        monkeypatch.setattr(os, "fsync", failing)
        assert await partial.write(0, data[:LEAF_BYTES], trust_hash=True)
        await tried.wait()
        assert partial.written == partial.relayable == 0, "it is in doubt"
        with pytest.raises(OSError):
            await partial.write(1, data[LEAF_BYTES:], trust_hash=True)
        assert await partial.write(1, data[LEAF_BYTES:], trust_hash=True)
        assert list(ready_leaves(directory, len(data))) == [1]
    assert claims_only_what_is_there(directory, data).missing_ranges() == [(0, LEAF_BYTES)]


def test_I6_a_bitmap_beyond_the_files_size_is_not_trusted(tmp_path: Path) -> None:
    directory = reserved(tmp_path)
    (directory / "have").write_bytes(b"\x07")
    (directory / "data").write_bytes(content(2 * LEAF_BYTES + 1)[: 2 * LEAF_BYTES])
    assert read_bitmap(directory, 2 * LEAF_BYTES + 1).missing_ranges() == [(2 * LEAF_BYTES, 2 * LEAF_BYTES + 1)]
    (directory / "have").write_bytes(b"\x07\x00")  # of another size
    assert read_bitmap(directory, 2 * LEAF_BYTES + 1).have_bytes == 0


async def test_a_lost_reservation_is_distinct_from_a_failed_source(tmp_path: Path) -> None:
    with pytest.raises(ReservationLost):
        async with opened(StorePaths(tmp_path).partial(BLOB), 1):
            pass


async def test_I1_a_cancelled_write_ends_before_its_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that wrote later would write into whatever file had got the same descriptor."""
    data, directory = content(LEAF_BYTES), reserved(tmp_path)
    begun, gate, real = asyncio.Event(), threading.Event(), os.pwrite
    loop = asyncio.get_running_loop()

    def slow(fd: int, piece: bytes, offset: int) -> int:
        loop.call_soon_threadsafe(begun.set)
        assert gate.wait(45)
        return real(fd, piece, offset)

    monkeypatch.setattr(os, "pwrite", slow)

    async def writing() -> None:
        async with opened(directory, len(data)) as partial:
            await fill(partial, data, [len(data)])

    task = asyncio.create_task(writing())
    await begun.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=0.05)
    assert not task.done(), "the file was closed under a thread that writes"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (directory / "data").read_bytes() == data


async def test_short_writes_are_written_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, directory, real = content(LEAF_BYTES), reserved(tmp_path), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, piece, offset: real(fd, piece[:100_000], offset))
    async with opened(directory, len(data)) as partial:
        await fill(partial, data, [len(data)])
    assert (directory / "data").read_bytes() == data
