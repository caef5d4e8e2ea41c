"""Writes to a partial blob's files: all bytes or an error that names the disk."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from shoal_common.host.private_files import open_private
from shoal_common.store.disk_full import map_disk_full
from shoal_fetcher.errors import ReservationLost

_PROBE_BYTES = 4096
"""At most the least that a partial blob can lack: a probe must not need more than the fetch does."""


def map_full_disk_of(directory: Path) -> AbstractContextManager[None]:
    """Map a disk too full for a partial blob's files to DiskFull."""
    blob = directory.name
    return map_disk_full(f"writing blob {blob[:16]}…", "free some space and the download resumes", blob=blob)


def probe_disk(directory: Path) -> None:
    """Write and delete a block beside a partial blob. Raises DiskFull, or ReservationLost if the partial is gone.

    The free space of a file system does not show a quota, and sending bytes in vain is not free.
    """
    path = directory / "probe"
    with map_full_disk_of(directory):
        try:
            fd = open_private(path, os.O_WRONLY | os.O_TRUNC)
        except FileNotFoundError:
            raise ReservationLost(f"the reservation of blob {directory.name[:16]}… is gone") from None
        try:
            write_all_at(fd, bytes(_PROBE_BYTES), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)


def write_all_at(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    remaining = memoryview(data)
    while remaining:
        written = os.pwrite(fd, remaining, offset)
        remaining, offset = remaining[written:], offset + written
