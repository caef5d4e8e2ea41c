"""A partial blob: write verified leaves, then the bitmap."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from shoal_common.errors import DiskFull
from shoal_common.logs import StructuredLogger
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.leaf_hash import HASH_BYTES, leaf_hash, leaf_list_size
from shoal_common.store.leaf_set import from_bitmap, leaf_ranges, to_bitmap
from shoal_common.store.relay_bitmap import RelayBitmapFile
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.errors import ReservationLost
from shoal_fetcher.partials.bitmap_file import (
    UNKNOWN_HASH,
    each_leaf,
    first_leaves,
    leaves_with_hash,
    read_bitmap,
    relayable_leaves,
)
from shoal_fetcher.partials.blocking import LeafWorkers, run_in_default_executor
from shoal_fetcher.partials.disk_writes import map_full_disk_of, write_all_at

log = StructuredLogger("partial")
CHECKPOINT_LEAVES = 16
CHECKPOINT_INTERVAL_S = 1.0
_CHECK_LEAVES = 64
"""Leaves that are hashed again between two checks for cancellation."""


class PartialBlob:
    """An open partial blob. Leaving `async with` makes what has arrived durable, also after an error.

    Sets of leaves are ints (`leaf_set.py`). Raises DiskFull if the disk is full; durable leaves stay durable.
    """

    def __init__(self, layout: StorePaths, workers: LeafWorkers, blob: str, size_bytes: int) -> None:
        self._layout, self._workers, self._blob, self.size_bytes = layout, workers, blob, size_bytes
        self._directory = layout.partial(blob)
        self.leaf_count = leaf_count(size_bytes)
        self.all_leaves = leaf_set.all_leaves(size_bytes)
        self.written = 0
        """Leaves that are written, durable or not."""
        self.relayable = 0
        """Written leaves that match the list: what others may fetch."""
        self.with_known_hash = 0
        """Leaves whose hash is known."""
        self.on_change: Callable[[], None] = lambda: None
        """Called in the loop when leaves have become durable, or could not."""
        self._durable = self._unsynced = self._trusting = 0
        self._list = bytearray(leaf_list_size(size_bytes))
        self._bits_lock = threading.Lock()
        self._fd = self._have_fd = self._list_fd = -1
        self._ready_file: RelayBitmapFile | None = None
        self._leaf_written, self._batch_full = asyncio.Event(), asyncio.Event()
        self._failed: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._checkpoint_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> PartialBlob:
        try:
            unverified, only_ready = await run_in_default_executor(self._open)
            await self._check(unverified, rewrite=0)
            await self._check(only_ready, rewrite=only_ready)
            await run_in_default_executor(self._write_ready_file)
        except BaseException:
            self._close()
            raise
        self._checkpoint_task = asyncio.create_task(self._checkpoint_forever())
        return self

    def _open(self) -> tuple[int, int]:
        """Return the durable leaves that must be hashed again, and those that only `ready` lists."""
        with map_full_disk_of(self._directory):
            try:
                self._fd = os.open(self._directory / "data", os.O_RDWR)
                durable = from_bitmap(read_bitmap(self._directory, self.size_bytes).to_bytes())
                claimed = relayable_leaves(self._layout, self._blob, self.size_bytes)
                self._have_fd = self._open_full_length("have", to_bitmap(durable, self.leaf_count))
                self._list_fd = self._open_list()
            except FileNotFoundError:
                raise ReservationLost(f"the reservation of blob {self._directory.name[:16]}… is gone") from None
        self._durable = durable
        ready = claimed or 0
        self.relayable = durable & ready & self.with_known_hash
        self.written = durable | ready
        # After another boot: a disk that lied may have lost what was durable, and nobody has checked since.
        unverified = durable & self.with_known_hash & ~self.relayable
        return unverified, ready & ~durable

    def _open_list(self) -> int:
        path = self._directory / "leaves"
        content = path.read_bytes() if path.exists() else b""
        if len(content) == len(self._list):
            self._list[:] = content
            self.with_known_hash = leaves_with_hash(content)
        return self._open_full_length("leaves", bytes(self._list))

    def _open_full_length(self, name: str, content: bytes) -> int:
        """Open a file for writing in place, after giving it this content, which has its final length."""
        path = self._directory / name
        if not path.exists() or path.read_bytes() != content:
            new = self._directory / f"{name}.new"
            new.write_bytes(content)
            new.replace(path)
        return os.open(path, os.O_RDWR)

    def _write_ready_file(self) -> None:
        """Write `ready` again, with the leaves that are verified and no others."""
        with map_full_disk_of(self._directory), self._bits_lock:
            if self._ready_file is not None:
                self._ready_file.close()
            self._layout.relay_bitmap(self._blob).unlink(missing_ok=True)
            verified = Bitmap(self.size_bytes, to_bitmap(self.relayable, self.leaf_count))
            self._ready_file = RelayBitmapFile(self._layout, self._blob, verified)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._checkpoint_task is not None:
                self._checkpoint_task.cancel()
                await asyncio.wait({self._checkpoint_task})
            if error is None:
                self.raise_failure()
            await self.checkpoint()
        except (OSError, DiskFull) as e:
            if error is None:
                raise
            # Leaves that are not durable are fetched again. The error that ended the writing says more, or is a
            # cancellation, which must not be replaced.
            log.warning("the last leaves are not durable", blob=self._directory.name, reason=str(e))
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
        """Bytes of the leaves set in `have`."""
        return self.bytes_of(self._durable)

    def bytes_of(self, leaves: int) -> int:
        """Return the bytes of a set of leaves."""
        return leaf_set.byte_count(leaves, self.size_bytes)

    def leaf_bytes(self, leaf: int) -> int:
        """Return the size of a leaf: 1 MiB, less for the last one."""
        return min(LEAF_BYTES, self.size_bytes - leaf * LEAF_BYTES)

    # Leaf list

    def hash_of(self, leaf: int) -> bytes | None:
        """Return the hash of a leaf, None if it is unknown."""
        known = bytes(self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES])
        return None if known == UNKNOWN_HASH else known

    @property
    def leaf_list(self) -> bytes:
        """The leaf list as it is now, zeros where unknown."""
        return bytes(self._list)

    async def add_hashes(self, first_leaf: int, hashes: bytes) -> int:
        """Take the hashes of leaves from `first_leaf` on where none is known yet. Returns the leaves learned.

        Leaves that are present without a hash are verified; corrupt ones are fetched again.
        """
        learned = 0
        for offset in range(0, len(hashes) - HASH_BYTES + 1, HASH_BYTES):
            leaf = first_leaf + offset // HASH_BYTES
            hash_of_leaf = hashes[offset : offset + HASH_BYTES]
            if leaf >= self.leaf_count:
                break
            if hash_of_leaf != UNKNOWN_HASH and not (self.with_known_hash | self._trusting) >> leaf & 1:
                self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] = hash_of_leaf
                learned |= 1 << leaf
        if learned:
            await run_in_default_executor(self._write_list, learned)
            self.with_known_hash |= learned
            await self._check(learned & self.written & ~self.relayable)
        return learned

    async def apply_sealed_list(self, hashes: bytes) -> int:
        """Take a sealed list. Returns the leaves whose known hash it contradicts; present ones are discarded."""
        differing = await run_in_default_executor(self._replace_list, hashes)
        await self._discard(differing & self.written)
        await self._check(self.written & ~self.relayable)
        return differing

    def _replace_list(self, hashes: bytes) -> int:
        differing = 0
        with self._bits_lock:
            for leaf in each_leaf(self.with_known_hash):
                if self.hash_of(leaf) != hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES]:
                    differing |= 1 << leaf
            self._list[:] = hashes
            self.with_known_hash = self.all_leaves
        self._write_list(self.all_leaves)
        return differing

    def _write_list(self, leaves: int) -> None:
        with map_full_disk_of(self._directory):
            for first, end in leaf_ranges(leaves):
                write_all_at(
                    self._list_fd, bytes(self._list[first * HASH_BYTES : end * HASH_BYTES]), first * HASH_BYTES
                )

    # Leaves

    async def write(self, leaf: int, data: bytes | bytearray | memoryview, trust_hash: bool = False) -> bool:
        """Verify a leaf, write it and make it available to peers. Returns False if it does not match the list.

        `trust_hash`: where the list has no hash yet, trust this leaf's. Raises DiskFull or OSError, also for earlier
        leaves that could not be made durable.
        """
        self.raise_failure()
        assert len(data) == self.leaf_bytes(leaf)
        expected = self.hash_of(leaf) if self.with_known_hash >> leaf & 1 else None
        if expected is None:
            assert trust_hash, f"the hash of leaf {leaf} is unknown"
            self._trusting |= 1 << leaf
        try:
            return await self._workers.run(self._verify_and_write, leaf, data, expected)
        finally:
            self._trusting &= ~(1 << leaf)

    def _verify_and_write(self, leaf: int, data: bytes | bytearray | memoryview, expected: bytes | None) -> bool:
        actual = leaf_hash(data)
        if expected is not None and actual != expected:
            return False
        bit = 1 << leaf
        if self.written & bit and (self.relayable & bit or expected is None):
            return True
        with map_full_disk_of(self._directory):
            write_all_at(self._fd, data, leaf * LEAF_BYTES)
            with self._bits_lock:
                current = self.hash_of(leaf) if self.with_known_hash & bit else None
                if current is None:
                    self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] = actual
                    write_all_at(self._list_fd, actual, leaf * HASH_BYTES)
                elif current != actual:
                    # A sealed list has arrived meanwhile and contradicts it: the leaf is fetched again.
                    return True
                assert self._ready_file is not None
                self._ready_file.add([leaf])
                self.with_known_hash |= bit
                self.written |= bit
                self.relayable |= bit
                self._unsynced |= bit
                fresh_count = self._unsynced.bit_count()
        self._loop.call_soon_threadsafe(self._leaf_written.set)
        if fresh_count >= CHECKPOINT_LEAVES:
            self._loop.call_soon_threadsafe(self._batch_full.set)
        return True

    async def adopt_held_leaves(self) -> int:
        """Add the hashes of present leaves that are in nobody's list to the list. Returns these leaves."""
        added = 0
        while unlisted := self.written & ~self.with_known_hash:
            batch = first_leaves(unlisted, _CHECK_LEAVES)
            await self._workers.run(self._list_leaves, batch)
            added |= batch & self.with_known_hash
        return added

    def _list_leaves(self, leaves: int) -> None:
        with map_full_disk_of(self._directory):
            for leaf in each_leaf(leaves):
                actual = leaf_hash(self.read(leaf))
                self._list[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES] = actual
                write_all_at(self._list_fd, actual, leaf * HASH_BYTES)
            with self._bits_lock:
                assert self._ready_file is not None
                self._ready_file.add(each_leaf(leaves))
                self.with_known_hash |= leaves
                self.relayable |= leaves

    def read(self, leaf: int) -> bytes:
        """Return a leaf as it is in the file. Blocking."""
        return os.pread(self._fd, self.leaf_bytes(leaf), leaf * LEAF_BYTES)

    async def _check(self, leaves: int, rewrite: int = 0) -> None:
        """Hash present leaves: those that match the list become ready, the others are discarded.

        `rewrite`: leaves of which nobody knows whether the disk took them; they are written again, for the next
        fsync.
        """
        mismatching = leaves & ~self.with_known_hash if rewrite else 0
        remaining = leaves & self.with_known_hash
        while remaining:
            batch = first_leaves(remaining, _CHECK_LEAVES)
            mismatching |= await self._workers.run(self._mismatching, batch, rewrite)
            remaining &= ~batch
        await self._discard(mismatching)

    def _mismatching(self, leaves: int, rewrite: int) -> int:
        mismatching = 0
        with map_full_disk_of(self._directory):
            for leaf in each_leaf(leaves):
                bit, data = 1 << leaf, self.read(leaf)
                if leaf_hash(data) != self.hash_of(leaf):
                    mismatching |= bit
                    continue
                if rewrite & bit:
                    write_all_at(self._fd, data, leaf * LEAF_BYTES)
                with self._bits_lock:
                    self.relayable |= bit
                    if rewrite & bit:
                        self._unsynced |= bit
                    if self._ready_file is not None:
                        self._ready_file.add([leaf])
        if self._unsynced:
            self._loop.call_soon_threadsafe(self._leaf_written.set)
        return mismatching

    async def _discard(self, leaves: int) -> None:
        """Mark corrupt leaves as missing, so that they are fetched again."""
        if leaves:
            log.warning("corrupt leaves, fetching them again", blob=self._blob, count=leaves.bit_count())
            await run_in_default_executor(self._clear_bits, leaves)

    def _clear_bits(self, leaves: int) -> None:
        with self._bits_lock:
            self.written &= ~leaves
            self.relayable &= ~leaves
            self._unsynced &= ~leaves
            self._durable &= ~leaves
        with map_full_disk_of(self._directory):
            write_all_at(self._have_fd, to_bitmap(self._durable, self.leaf_count), 0)
        if self._ready_file is not None:
            self._write_ready_file()

    # Durability

    def raise_failure(self) -> None:
        """Raise, once, the error that kept leaves from becoming durable."""
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    async def _checkpoint_forever(self) -> None:
        """Checkpoint while leaves arrive."""
        while True:
            await self._leaf_written.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECKPOINT_INTERVAL_S):
                    await self._batch_full.wait()
            self._leaf_written.clear()
            self._batch_full.clear()
            try:
                await self.checkpoint()
            except (OSError, DiskFull) as e:
                self._failed = e
            self.on_change()

    async def checkpoint(self) -> None:
        """Make written leaves durable and set them in `have`. After DiskFull or OSError they are fetched again."""
        await run_in_default_executor(self._make_durable)

    def _make_durable(self) -> None:
        with self._bits_lock:
            unsynced, self._unsynced = self._unsynced, 0
        if not unsynced:
            return
        try:
            with map_full_disk_of(self._directory):
                os.fsync(self._fd)
                write_all_at(self._have_fd, to_bitmap(self._durable | unsynced, self.leaf_count), 0)
        except BaseException:
            # After a failed fsync these leaves are in doubt: fetch them again rather than sync again.
            with self._bits_lock:
                self.written &= ~unsynced
                self.relayable &= ~unsynced
            with suppress(OSError, DiskFull):
                self._write_ready_file()
            raise
        with self._bits_lock:
            self._durable |= unsynced
