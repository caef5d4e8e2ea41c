"""A home on a disk that is full, missing or read-only: what can be freed before a start, and what people are told."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_cli.node_home import Home
from shoal_common.config import read_settings_file, store_directory
from shoal_common.errors import DISK_FULL, BadInput, DiskFull, ShoalError
from shoal_common.host.disk_space import device_of, free_bytes_of, nearest_existing
from shoal_common.store.ballast import BallastFile
from shoal_common.store.store_paths import StorePaths
from shoal_common.units import format_bytes

_MIN_FREE_BYTES = 1 << 20
"""A node starts with less, but its logs and NATS would stop it soon."""
_ELSEWHERE = "choose another directory with --home or SHOAL_HOME"


@contextmanager
def disk_errors_named(home: Path) -> Iterator[None]:
    """Raise DiskFull or BadInput, naming path, reason and remedy, instead of an OSError of the home's disk."""
    broken = next((path for path in (home, *home.parents) if path.is_symlink() and not path.exists()), None)
    if broken is not None:
        raise BadInput(
            f"{broken} is a link to {broken.readlink()}, which is not there: mount its disk, or {_ELSEWHERE}"
        )
    try:
        yield
    except OSError as e:
        named = disk_error(e, home)
        if named is None:
            raise
        raise named from e


def disk_error(error: OSError, home: Path) -> ShoalError | None:
    """Return what people read of an error that the disk of a home causes; None for any other."""
    path = error.filename or home
    if error.errno in DISK_FULL:
        free = ""
        with suppress(OSError):
            free = f", {format_bytes(free_bytes_of(nearest_existing(home)))} free"
        return DiskFull(f"the disk of {home} is full ({error.strerror}{free}): free some space there, then try again")
    if error.errno == errno.EROFS:
        return BadInput(f"{path} cannot be written ({error.strerror}): mount it read-write, or {_ELSEWHERE}")
    if error.errno == errno.EIO:
        return BadInput(f"{path} cannot be used ({error.strerror}): check that disk, or {_ELSEWHERE}")
    return None


def free_ballasts(home: Home) -> str:
    """Give up the ballasts on a home's disk if that is full. Returns what was done, for a person; "" for nothing.

    Everything that frees space needs a running node, and a node needs some to start.
    """
    if not home.root.is_dir() or free_bytes_of(home.root) >= _MIN_FREE_BYTES:
        return ""
    settings = {}
    with suppress(ShoalError, OSError):
        settings = read_settings_file(home.root)
    freed_bytes = 0
    for path in (home.nats_ballast, StorePaths(store_directory(home.root, settings)).ballast):
        if path.is_file() and device_of(path) == device_of(home.root):
            ballast = BallastFile(path, 0)
            ballast.read_size()
            freed_bytes += ballast.release()
    freed = f"{format_bytes(freed_bytes)} of ballast given up" if freed_bytes else "there is no ballast to give up"
    return f"the disk of {home.root} is full, {freed}: free space with `shoal rm` or `shoal gc`"
