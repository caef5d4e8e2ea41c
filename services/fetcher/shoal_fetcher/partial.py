"""A blob that arrives: leaves in any order, from several at once, each verified before it is written.

    partial/<blob>/data      leaves at their places
                   have      bitmap of leaves that are durable
                   leaves    the leaf list as far as it is known, zeros elsewhere
                   ready     what can be relayed now (`shoal_common/ready.py`)

`have` is written after its data is on the disk, so a start after any crash may believe it (a progress file written
earlier has claimed megabytes of zeros). A leaf that is there is never written again.

All of them get their whole length before the first byte of data, and are then written in place: a disk that is full
to the last byte takes that, where it would take no new file. Bits are only ever set, each after its leaf, so that any
mixture of the old and the new bitmap is true as well. The one exception is a leaf that turns out not to be what it
should be, or that the disk did not take: its bits are taken back, and it is fetched again.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from shoal_common import leafset
from shoal_common.errors import DISK_FULL, DiskFull
from shoal_common.layout import LEAF_BYTES, Bitmap, Layout, leaf_count
from shoal_common.leaves import HASH_BYTES, leaf_hash, list_bytes
from shoal_common.logs import Log
from shoal_common.ready import Ready, ready_of
from shoal_common.runs import from_bitmap, run, runs_of, to_bitmap
from shoal_fetcher.errors import ReservationLost

P = ParamSpec("P")
T = TypeVar("T")
log = Log("partial")

CHECKPOINT_LEAVES = 16
CHECKPOINT_S = 1.0
_PROBE_BYTES = 4096
"""No more than the least that a partial can lack: a probe must not ask for more than the fetch does."""
_CHECK_LEAVES = 64
"""Leaves that are hashed again before it is looked whether somebody wants it to end."""
_UNKNOWN = bytes(HASH_BYTES)
_workers = ThreadPoolExecutor(min(os.cpu_count() or 1, 4), "leaves")
"""Hash and write leaves; more than there are cores would only wait for each other, at the file.

Apart from the loop's own threads: those may all wait for an fsync.
"""


class PartialBlob:
    """A partial, open. `async with` makes what has arrived durable at the end, however it ends.

    Sets of leaves are ints (`shoal_common/runs.py`). Raises DiskFull when the disk takes no more; what was durable
    stays so.
    """

    def __init__(self, layout: Layout, blob: str, size_bytes: int) -> None:
        self._layout, self._blob, self.size_bytes = layout, blob, size_bytes
        self._directory = layout.partial(blob)
        self.leaf_count = leaf_count(size_bytes)
        self.all = leafset.whole(size_bytes)
        self.here = 0
        """Leaves that are written, durable or not."""
        self.ready = 0
        """Those of them that are what the list says: what others may have."""
        self.known = 0
        """Leaves whose hash the list has."""
        self.changed: Callable[[], None] = lambda: None
        """Called in the loop when leaves have become durable, or could not."""
        self._durable = self._fresh = self._vouching = 0
        self._list = bytearray(list_bytes(size_bytes))
        self._bits = threading.Lock()
        self._fd = self._have_fd = self._list_fd = -1
        self._ready_file: Ready | None = None
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._failed: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> PartialBlob:
        try:
            doubtful, further = await to_its_end(self._open)
            await self._check(doubtful, rewrite=0)
            await self._check(further, rewrite=further)
            await to_its_end(self._begin_ready)
        except BaseException:
            self._close()
            raise
        self._keeping = asyncio.create_task(self._keep_durable())
        return self

    def _open(self) -> tuple[int, int]:
        """Returns leaves whose being there has to be looked at, and those that are only said to be ready."""
        with _told(self._directory):
            try:
                self._fd = os.open(self._directory / "data", os.O_RDWR)
                durable = from_bitmap(read_bitmap(self._directory, self.size_bytes).to_bytes())
                claimed = _ready_of(self._layout, self._blob, self.size_bytes)
                self._have_fd = self._of_whole_length("have", to_bitmap(durable, self.leaf_count))
                self._list_fd = self._open_list()
            except FileNotFoundError:
                raise ReservationLost(f"the reservation of blob {self._directory.name[:16]}… has gone") from None
        self._durable = durable
        ready = claimed or 0
        self.ready = durable & ready & self.known
        self.here = durable | ready
        # Another boot: what was durable then may have been lost by a disk that lied, and nobody has looked since.
        doubtful = durable & self.known & ~self.ready
        return doubtful, ready & ~durable

    def _open_list(self) -> int:
        path = self._directory / "leaves"
        found = path.read_bytes() if path.exists() else b""
        if len(found) == len(self._list):
            self._list[:] = found
            self.known = _known_in(found)
        return self._of_whole_length("leaves", bytes(self._list))

    def _of_whole_length(self, name: str, content: bytes) -> int:
        """A file as long as it will ever be, with what is believed of it; open to be written in place."""
        path = self._directory / name
        if not path.exists() or path.read_bytes() != content:
            new = self._directory / f"{name}.new"
            new.write_bytes(content)
            new.replace(path)
        return os.open(path, os.O_RDWR)

    def _begin_ready(self) -> None:
        """`ready`, with what has been looked at and nothing else."""
        with _told(self._directory), self._bits:
            if self._ready_file is not None:
                self._ready_file.close()
            self._layout.partial_ready(self._blob).unlink(missing_ok=True)
            said = Bitmap(self.size_bytes, to_bitmap(self.ready, self.leaf_count))
            self._ready_file = Ready(self._layout, self._blob, said)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._keeping is not None:
                self._keeping.cancel()
                await asyncio.wait({self._keeping})
            if error is None:
                self.raise_failure()
            await self.checkpoint()
        except (OSError, DiskFull) as e:
            if error is None:
                raise
            # Leaves that could not be made durable are fetched again; what ended the writing says more, or is a
            # cancellation, which must not turn into anything else.
            log.warning("the last leaves are not durable", blob=self._directory.name, why=str(e))
        finally:
            self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._have_fd, self._list_fd):
            if fd >= 0:
                os.close(fd)
        if self._ready_file is not None:
            self._ready_file.close()
        self._fd = self._have_fd = self._list_fd = -1

    @property
    def durable_bytes(self) -> int:
        """Bytes of the leaves that `have` holds."""
        return self.bytes_of(self._durable)

    def bytes_of(self, leaves: int) -> int:
        """Bytes of a set of leaves."""
        return leafset.size_of(leaves, self.size_bytes)

    def leaf_bytes(self, leaf: int) -> int:
        """Size of a leaf: 1 MiB, less for the last one."""
        return min(LEAF_BYTES, self.size_bytes - leaf * LEAF_BYTES)

    # The list

    def hash_of(self, leaf: int) -> bytes | None:
        """What a leaf hashes to, as far as it is known."""
        found = bytes(self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES])
        return None if found == _UNKNOWN else found

    @property
    def hashes(self) -> bytes:
        """The list as it is now."""
        return bytes(self._list)

    async def learn(self, first_leaf: int, hashes: bytes) -> int:
        """Take the hashes of leaves from `first_leaf` on where none is known yet. Returns the leaves learned.

        Leaves that were here without one are looked at: one that is something else is fetched again.
        """
        learned = 0
        for at in range(0, len(hashes) - HASH_BYTES + 1, HASH_BYTES):
            leaf = first_leaf + at // HASH_BYTES
            its_hash = hashes[at : at + HASH_BYTES]
            if leaf >= self.leaf_count:
                break
            if its_hash != _UNKNOWN and not (self.known | self._vouching) >> leaf & 1:
                self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] = its_hash
                learned |= 1 << leaf
        if learned:
            await to_its_end(self._write_list, learned)
            self.known |= learned
            await self._check(learned & self.here & ~self.ready)
        return learned

    async def use_list(self, hashes: bytes) -> int:
        """Take a list that is sealed. Leaves here that it says something else of are given up: returns them."""
        differing = await to_its_end(self._adopt, hashes)
        await self._give_up(differing & self.here)
        await self._check(self.here & ~self.ready)
        return differing

    def _adopt(self, hashes: bytes) -> int:
        differing = 0
        with self._bits:
            for leaf in _each(self.known):
                if self.hash_of(leaf) != hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES]:
                    differing |= 1 << leaf
            self._list[:] = hashes
            self.known = self.all
        self._write_list(self.all)
        return differing

    def _write_list(self, leaves: int) -> None:
        with _told(self._directory):
            for first, end in runs_of(leaves):
                _pwrite(self._list_fd, bytes(self._list[first * HASH_BYTES : end * HASH_BYTES]), first * HASH_BYTES)

    # Leaves

    async def write(self, leaf: int, data: bytes | bytearray | memoryview, vouch: bool = False) -> bool:
        """Take a leaf: verify it, write it, have it relayed. False when it is not what the list says.

        `vouch`: where the list does not know yet, this is what it is. Raises DiskFull, OSError; also for leaves that
        came before and that the disk did not take after all.
        """
        self.raise_failure()
        assert len(data) == self.leaf_bytes(leaf)
        expected = self.hash_of(leaf) if self.known >> leaf & 1 else None
        if expected is None:
            assert vouch, f"nobody knows what leaf {leaf} should be"
            self._vouching |= 1 << leaf
        try:
            return await _worked(self._verify_and_write, leaf, data, expected)
        finally:
            self._vouching &= ~(1 << leaf)

    def _verify_and_write(self, leaf: int, data: bytes | bytearray | memoryview, expected: bytes | None) -> bool:
        found = leaf_hash(data)
        if expected is not None and found != expected:
            return False
        bit = 1 << leaf
        if self.here & bit and (self.ready & bit or expected is None):
            return True
        with _told(self._directory):
            _pwrite(self._fd, data, leaf * LEAF_BYTES)
            with self._bits:
                now = self.hash_of(leaf) if self.known & bit else None
                if now is None:
                    self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] = found
                    _pwrite(self._list_fd, found, leaf * HASH_BYTES)
                elif now != found:
                    # A sealed list has come meanwhile, and says something else: it is fetched again.
                    return True
                assert self._ready_file is not None
                self._ready_file.add([leaf])
                self.known |= bit
                self.here |= bit
                self.ready |= bit
                self._fresh |= bit
                many = self._fresh.bit_count()
        self._loop.call_soon_threadsafe(self._some.set)
        if many >= CHECKPOINT_LEAVES:
            self._loop.call_soon_threadsafe(self._enough.set)
        return True

    async def vouch_for_held(self) -> int:
        """Make what is here without anybody's having said its hash part of the list. Returns these leaves."""
        told = 0
        while doubtful := self.here & ~self.known:
            batch = _first_of(doubtful, _CHECK_LEAVES)
            await _worked(self._vouch, batch)
            told |= batch & self.known
        return told

    def _vouch(self, leaves: int) -> None:
        with _told(self._directory):
            for leaf in _each(leaves):
                found = leaf_hash(self.read(leaf))
                self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] = found
                _pwrite(self._list_fd, found, leaf * HASH_BYTES)
            with self._bits:
                assert self._ready_file is not None
                self._ready_file.add(_each(leaves))
                self.known |= leaves
                self.ready |= leaves

    def read(self, leaf: int) -> bytes:
        """A leaf as the file has it. Blocking."""
        return os.pread(self._fd, self.leaf_bytes(leaf), leaf * LEAF_BYTES)

    async def _check(self, leaves: int, rewrite: int = 0) -> None:
        """Hash leaves that are here: those that are what the list says are ready, the others are given up.

        `rewrite`: of these nobody knows whether the disk took them; they are written again, for the next fsync.
        """
        bad = leaves & ~self.known if rewrite else 0
        left = leaves & self.known
        while left:
            batch = _first_of(left, _CHECK_LEAVES)
            bad |= await _worked(self._unlike, batch, rewrite)
            left &= ~batch
        await self._give_up(bad)

    def _unlike(self, leaves: int, rewrite: int) -> int:
        bad = 0
        with _told(self._directory):
            for leaf in _each(leaves):
                bit, data = 1 << leaf, self.read(leaf)
                if leaf_hash(data) != self.hash_of(leaf):
                    bad |= bit
                    continue
                if rewrite & bit:
                    _pwrite(self._fd, data, leaf * LEAF_BYTES)
                with self._bits:
                    self.ready |= bit
                    if rewrite & bit:
                        self._fresh |= bit
                    if self._ready_file is not None:
                        self._ready_file.add([leaf])
        if self._fresh:
            self._loop.call_soon_threadsafe(self._some.set)
        return bad

    async def _give_up(self, leaves: int) -> None:
        """These are not what they should be: they are not here, and come again."""
        if leaves:
            log.warning("leaves that are not what they should be", blob=self._blob, count=leaves.bit_count())
            await to_its_end(self._take_back, leaves)

    def _take_back(self, leaves: int) -> None:
        with self._bits:
            self.here &= ~leaves
            self.ready &= ~leaves
            self._fresh &= ~leaves
            self._durable &= ~leaves
        with _told(self._directory):
            _pwrite(self._have_fd, to_bitmap(self._durable, self.leaf_count), 0)
        if self._ready_file is not None:
            self._begin_ready()

    # What is durable

    def raise_failure(self) -> None:
        """Raise what kept leaves from becoming durable since the last time that this was asked."""
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    async def _keep_durable(self) -> None:
        """`have` follows, while leaves go on arriving."""
        while True:
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECKPOINT_S):
                    await self._enough.wait()
            self._some.clear()
            self._enough.clear()
            try:
                await self.checkpoint()
            except (OSError, DiskFull) as e:
                self._failed = e
            self.changed()

    async def checkpoint(self) -> None:
        """Make durable what has come so far, and say so in `have`. Raises DiskFull, OSError: it comes again then."""
        await to_its_end(self._make_durable)

    def _make_durable(self) -> None:
        with self._bits:
            fresh, self._fresh = self._fresh, 0
        if not fresh:
            return
        try:
            with _told(self._directory):
                os.fsync(self._fd)
                _pwrite(self._have_fd, to_bitmap(self._durable | fresh, self.leaf_count), 0)
        except BaseException:
            # After a failed fsync these leaves are in doubt, and are fetched again rather than synced again.
            with self._bits:
                self.here &= ~fresh
                self.ready &= ~fresh
            with suppress(OSError, DiskFull):
                self._begin_ready()
            raise
        with self._bits:
            self._durable |= fresh


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """A full disk, in our own words."""
    blob = directory.name
    try:
        yield
    except OSError as e:
        if e.errno not in DISK_FULL:
            raise
        raise DiskFull(
            f"disk full: {e.strerror} while blob {blob[:16]}… arrived; free some space and it goes on by itself",
            blob=blob,
        ) from None


def probe(directory: Path) -> None:
    """Write a block beside a partial and take it away again. Raises DiskFull; ReservationLost when it has gone.

    A quota of the file system does not show in its free space, and bytes that a source sends in vain are not free.
    """
    path = directory / "probe"
    with _told(directory):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except FileNotFoundError:
            raise ReservationLost(f"the reservation of blob {directory.name[:16]}… has gone") from None
        try:
            _pwrite(fd, bytes(_PROBE_BYTES), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)


def _pwrite(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def read_bitmap(directory: Path, size_bytes: int) -> Bitmap:
    """Which leaves of a partial are durable. Blocking. One past the end of the data is not, whatever `have` says."""
    try:
        bitmap = Bitmap(size_bytes, (directory / "have").read_bytes())
        data_bytes = (directory / "data").stat().st_size
    except FileNotFoundError:
        return Bitmap(size_bytes)
    believed = Bitmap(size_bytes)
    for leaf in range(bitmap.leaves):
        if leaf in bitmap and leaf * LEAF_BYTES + bitmap.leaf_bytes(leaf) <= data_bytes:
            believed.add(leaf)
    return believed


def held_bytes(layout: Layout, blob: str, size_bytes: int) -> int:
    """Bytes of a partial from which a fetch goes on: durable ones, and what this boot has written. Blocking."""
    durable = from_bitmap(read_bitmap(layout.partial(blob), size_bytes).to_bytes())
    count = leaf_count(size_bytes)
    return Bitmap(size_bytes, to_bitmap(durable | (_ready_of(layout, blob, size_bytes) or 0), count)).have_bytes


def _ready_of(layout: Layout, blob: str, size_bytes: int) -> int | None:
    """What `ready` says in this boot; None when it says nothing."""
    try:
        found = ready_of(layout.partial_ready(blob).read_bytes())
    except FileNotFoundError:
        return None
    return from_bitmap(found.to_bytes()) if found is not None and found.size_bytes == size_bytes else None


def _known_in(hashes: bytes) -> int:
    """The leaves that a list knows."""
    known = 0
    for leaf in range(len(hashes) // HASH_BYTES):
        if hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] != _UNKNOWN:
            known |= 1 << leaf
    return known


def _each(leaves: int) -> Iterator[int]:
    for first, end in runs_of(leaves):
        yield from range(first, end)


def _first_of(leaves: int, count: int) -> int:
    """The first leaves of a set, about so many."""
    for first, end in runs_of(leaves):
        return run(first, min(end, first + count))
    return 0


async def to_its_end(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread, and not return before it has ended, cancelled or not.

    The file is closed afterwards: a thread that still wrote would write into whatever has its descriptor then.
    """
    return await _ended(asyncio.get_running_loop().run_in_executor(None, partial(call, *args, **kwargs)))


async def _worked(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The same, by those who hash and write leaves."""
    return await _ended(asyncio.get_running_loop().run_in_executor(_workers, partial(call, *args, **kwargs)))


async def _ended(working: asyncio.Future[T]) -> T:
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({working})
        working.exception()
        raise
