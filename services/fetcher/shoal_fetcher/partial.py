"""Writing a blob that arrives: whole leaves at their place, and a bitmap of those that are durable.

The bitmap is written after its data is on the disk, so a start after any crash may believe it (a progress file
written earlier has claimed megabytes of zeros). A leaf that is there is never written again.

`have` gets its whole length before the first byte of data, and is then written in place: a disk that is full to the
last byte takes that, where it would take no new file. Bits are only ever set, each after its leaf is durable, so that
any mixture of the old and the new bitmap is true as well.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from shoal_common.errors import DISK_FULL, DiskFull
from shoal_common.layout import LEAF_BYTES, Bitmap
from shoal_common.logs import Log
from shoal_fetcher.errors import ReservationLost

P = ParamSpec("P")
T = TypeVar("T")
log = Log("partial")

CHECKPOINT_LEAVES = 16
CHECKPOINT_S = 1.0
_PROBE_BYTES = 4096
"""No more than the least that a partial can lack: a probe must not ask for more than the fetch does."""


class PartialBlob:
    """A partial, open for one writer. `async with` makes what has arrived durable at the end, however it ends.

    Raises DiskFull when the disk takes no more; what was durable stays so.
    """

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._directory, self.size_bytes = directory, size_bytes
        self.bitmap = Bitmap(size_bytes)
        self.durable_bytes = 0
        """Bytes of the leaves that the bitmap on the disk holds."""
        self._fd = self._have_fd = -1
        self._fresh: set[int] = set()
        self._checkpoint_at_s = 0.0
        self._leaf = bytearray()
        self._offset = 0

    async def __aenter__(self) -> PartialBlob:
        try:
            await _to_its_end(self._open)
        except BaseException:
            self._close()
            raise
        return self

    def _open(self) -> None:
        with _told(self._directory):
            try:
                self._fd = os.open(self._directory / "data", os.O_RDWR)
                self.bitmap = read_bitmap(self._directory, self.size_bytes)
                self._have_fd = self._open_have(self.bitmap.to_bytes())
            except FileNotFoundError:
                raise ReservationLost(f"the reservation of blob {self._directory.name[:16]}… has gone") from None
        self.durable_bytes = self.bitmap.have_bytes
        self._checkpoint_at_s = time.monotonic() + CHECKPOINT_S

    def _open_have(self, bits: bytes) -> int:
        """`have`, as long as it will ever be, with what is believed of it."""
        have = self._directory / "have"
        if not have.exists() or have.read_bytes() != bits:
            new = self._directory / "have.new"
            new.write_bytes(bits)
            new.replace(have)
        return os.open(have, os.O_WRONLY)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await _to_its_end(self._checkpoint)
        except (OSError, DiskFull) as e:
            if error is None:
                raise
            # Leaves that could not be made durable are fetched again; what ended the writing says more, or is a
            # cancellation, which must not turn into anything else.
            log.warning("the last leaves are not durable", blob=self._directory.name, why=str(e))
        finally:
            self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._have_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._have_fd = -1

    def begin_at(self, offset: int) -> None:
        """The next bytes belong here, on a leaf's boundary. What was held of an unfinished leaf is dropped."""
        assert offset % LEAF_BYTES == 0
        self._offset = offset
        self._leaf.clear()

    async def write(self, data: bytes) -> None:
        """Take bytes that follow the last ones. Whole leaves go to the file, and now and then to the bitmap."""
        self._leaf += data
        while self._leaf:
            leaf = self._offset // LEAF_BYTES
            if leaf >= self.bitmap.leaves or len(self._leaf) < self.bitmap.leaf_bytes(leaf):
                break
            size = self.bitmap.leaf_bytes(leaf)
            whole = bytes(self._leaf[:size])
            del self._leaf[:size]
            if not self._is_here(leaf):
                await _to_its_end(self._write_leaf, whole, self._offset)
                self._fresh.add(leaf)
            self._offset += size
        if len(self._fresh) >= CHECKPOINT_LEAVES or time.monotonic() >= self._checkpoint_at_s:
            await _to_its_end(self._checkpoint)

    def holds(self, start: int, end: int) -> bool:
        """Whether all leaves of bytes [start, end) are written, durable or not yet."""
        return all(self._is_here(leaf) for leaf in range(start // LEAF_BYTES, -(-end // LEAF_BYTES)))

    def _is_here(self, leaf: int) -> bool:
        return leaf in self.bitmap or leaf in self._fresh

    @property
    def overflowing(self) -> bool:
        """Whether the source sends more than the blob has."""
        return bool(self._leaf) and self._offset >= self.size_bytes

    def _write_leaf(self, data: bytes, offset: int) -> None:
        with _told(self._directory):
            _pwrite(self._fd, data, offset)

    def _checkpoint(self) -> None:
        self._checkpoint_at_s = time.monotonic() + CHECKPOINT_S
        # Taken first: after a failed fsync these leaves are in doubt, and are fetched again rather than synced again.
        fresh, self._fresh = self._fresh, set()
        if not fresh:
            return
        bitmap = Bitmap(self.size_bytes, self.bitmap.to_bytes())
        for leaf in fresh:
            bitmap.add(leaf)
        with _told(self._directory):
            os.fsync(self._fd)
            _pwrite(self._have_fd, bitmap.to_bytes(), 0)
        self.bitmap = bitmap
        self.durable_bytes += sum(bitmap.leaf_bytes(leaf) for leaf in fresh)


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


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


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


async def _to_its_end(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread, and not return before it has ended, cancelled or not.

    The file is closed afterwards: a thread that still wrote would write into whatever has its descriptor then.
    """
    working = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({working})
        working.exception()
        raise
