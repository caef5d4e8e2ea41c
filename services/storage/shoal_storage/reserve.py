"""The reserve file: bytes held back while there is plenty, and given up first when the disk is full.

`<store>/reserve` is really allocated, so that a disk which others have filled to the last byte has some left for what
storage must still write. It counts as free wherever storage decides whether something fits: it is never the reason
that something does not. On file systems that compress, or that copy on write (btrfs, ZFS, APFS), it may hold less
than its size.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

RESERVE_BYTES = 64 << 20
_PLENTY = 4
"""The reserve is made when so many times its size is free beside all that is promised."""
_CHUNK_BYTES = 1 << 20
_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

Step = Literal["make", "give up", "leave"]


def decide(held_bytes: int, size_bytes: int, free_bytes: int, headroom_bytes: int, in_flight_bytes: int) -> Step:
    """What to do with the reserve. Pure.

    `held_bytes`: what it holds now; `size_bytes`: what it is to hold, 0 for none; `free_bytes`: of the file system,
    without it.
    """
    if held_bytes and (not size_bytes or free_bytes == 0 or free_bytes < in_flight_bytes):
        return "give up"
    ample = free_bytes - headroom_bytes - in_flight_bytes >= _PLENTY * size_bytes
    return "make" if size_bytes and not held_bytes and ample else "leave"


class ReserveFile:
    """The file. Blocking: for threads."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self.size_bytes = path, size_bytes
        self.held_bytes = 0
        """What giving it up gives back."""

    def look(self) -> None:
        """At start: whether it is there. One that was half made when its process ended is removed."""
        self._fresh.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            found = self._path.stat()
            self.held_bytes = min(found.st_size, found.st_blocks * 512)

    @property
    def _fresh(self) -> Path:
        return self._path.with_name(f".{self._path.name}.new")

    def make(self) -> None:
        """Allocate it. Raises OSError, and leaves nothing then."""
        try:
            with self._fresh.open("wb", buffering=0) as f:
                _allocate(f.fileno(), self.size_bytes)
                os.fsync(f.fileno())
            self._fresh.replace(self._path)
        except BaseException:
            self._fresh.unlink(missing_ok=True)
            raise
        self.held_bytes = self.size_bytes

    def give_up(self) -> int:
        """Give its bytes back, which works on a full disk. Returns how many; 0 if there were none."""
        given, self.held_bytes = self.held_bytes, 0
        self._path.unlink(missing_ok=True)
        return given


def _allocate(fd: int, size_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):  # macOS has none
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            return
        except OSError as e:
            if e.errno not in _CANNOT:
                raise
    zeros = bytes(_CHUNK_BYTES)
    for at in range(0, size_bytes, _CHUNK_BYTES):
        left = memoryview(zeros)[: size_bytes - at]
        while left:
            left = left[os.write(fd, left) :]
