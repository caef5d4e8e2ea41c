"""The ballast: a file that is given up first when the disk is full."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from shoal_common.host.file_kinds import require_file

_MIN_FREE_MULTIPLE = 4
"""The ballast is made when this many times its size is free beside the headroom and all reservations."""
_CHUNK_BYTES = 1 << 20
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
Step = Literal["make", "give up", "leave"]


def next_step(held_bytes: int, size_bytes: int, free_bytes: int, headroom_bytes: int, in_flight_bytes: int) -> Step:
    """Return what to do with the ballast file. Pure.

    `held_bytes`: what it occupies now; `size_bytes`: its configured size, 0 for none; `free_bytes`: free on the file
    system, without it.
    """
    if held_bytes and (not size_bytes or free_bytes == 0 or free_bytes < in_flight_bytes):
        return "give up"
    ample = free_bytes - headroom_bytes - in_flight_bytes >= _MIN_FREE_MULTIPLE * size_bytes
    return "make" if size_bytes and not held_bytes and ample else "leave"


class BallastFile:
    """One ballast file. Blocking."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self.size_bytes = path, size_bytes
        self.held_bytes = 0
        """The bytes that giving it up frees."""

    def read_size(self) -> None:
        """Read its size at start. Removes one that was half made when its process ended. Raises BadInput."""
        require_file(self._path)
        self._temporary_path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            file_stat = self._path.stat()
            self.held_bytes = min(file_stat.st_size, file_stat.st_blocks * 512)

    @property
    def _temporary_path(self) -> Path:
        return self._path.with_name(f".{self._path.name}.new")

    def make(self) -> None:
        """Allocate it. Raises OSError and then leaves nothing behind."""
        try:
            with self._temporary_path.open("wb", buffering=0) as f:
                _allocate(f.fileno(), self.size_bytes)
                os.fsync(f.fileno())
            self._temporary_path.replace(self._path)
        except BaseException:
            self._temporary_path.unlink(missing_ok=True)
            raise
        self.held_bytes = self.size_bytes

    def release(self) -> int:
        """Delete it, which works on a full disk. Returns the bytes freed; 0 if there was none."""
        freed, self.held_bytes = self.held_bytes, 0
        self._path.unlink(missing_ok=True)
        return freed


def _allocate(fd: int, size_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            return
        except OSError as e:
            if e.errno not in _UNSUPPORTED:
                raise
    zeros = bytes(_CHUNK_BYTES)
    for offset in range(0, size_bytes, _CHUNK_BYTES):
        remaining = memoryview(zeros)[: size_bytes - offset]
        while remaining:
            remaining = remaining[os.write(fd, remaining) :]
