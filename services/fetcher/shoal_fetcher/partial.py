"""Writing a blob that arrives: whole leaves at their place, and a bitmap of those that are durable.

The bitmap is written after its data is on the disk, so a start after any crash may believe it (notes: a progress
file written earlier has claimed megabytes of zeros). A leaf that is there is never written again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

from shoal_common.layout import LEAF_BYTES, Bitmap
from shoal_fetcher.errors import ReservationLost

P = ParamSpec("P")
T = TypeVar("T")

CHECKPOINT_LEAVES = 16
CHECKPOINT_S = 1.0


class PartialBlob:
    """A partial, open for one writer. `async with` makes what has arrived durable at the end, however it ends."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self._directory, self.size_bytes = directory, size_bytes
        self.bitmap = Bitmap(size_bytes)
        self.durable_bytes = 0
        """Bytes of the leaves that the bitmap on the disk holds."""
        self._fd = -1
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
        try:
            self._fd = os.open(self._directory / "data", os.O_RDWR)
        except FileNotFoundError:
            raise ReservationLost(f"the reservation of blob {self._directory.name[:16]}… has gone") from None
        self.bitmap = read_bitmap(self._directory, self.size_bytes)
        self.durable_bytes = self.bitmap.have_bytes
        self._checkpoint_at_s = time.monotonic() + CHECKPOINT_S

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await _to_its_end(self._checkpoint)
        finally:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

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
                await _to_its_end(self._pwrite, whole, self._offset)
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

    def _pwrite(self, data: bytes, offset: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def _checkpoint(self) -> None:
        self._checkpoint_at_s = time.monotonic() + CHECKPOINT_S
        # Taken first: after a failed fsync these leaves are in doubt, and are fetched again rather than synced again.
        fresh, self._fresh = self._fresh, set()
        if not fresh:
            return
        os.fsync(self._fd)
        for leaf in fresh:
            self.bitmap.add(leaf)
            self.durable_bytes += self.bitmap.leaf_bytes(leaf)
        new = self._directory / "have.new"
        with suppress(FileNotFoundError):  # withdrawn while we wrote: nothing is left to resume
            new.write_bytes(self.bitmap.to_bytes())
            new.replace(self._directory / "have")


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
