"""Small files and names that survive a power cut once these functions have returned. Blocking: runs in threads."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(directory: Path, within: Path | None = None) -> None:
    """Make a directory and those above it: what is kept in it is lost with a name that is not.

    `within` has to be there: an unmounted disk is not written beside. Raises FileNotFoundError when it is not.
    """
    if not directory.exists():
        if directory == within:
            raise FileNotFoundError(errno.ENOENT, "it has gone", str(within))
        make_directory(directory.parent, within)
        directory.mkdir(exist_ok=True)
        sync(directory.parent)


def write_file(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
    """Write a small file so that it is either the old or the new one, with its bytes and this mtime.

    A kill may leave `.<name>.new` beside it.
    """
    put_file(path, data, mtime_ns)
    sync(path.parent)


def put_file(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
    """The same, but that it is there at all lasts only once its directory has been synced."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as f:
        f.write(data)
        f.flush()
        if mtime_ns is not None:
            os.utime(f.fileno(), ns=(mtime_ns, mtime_ns))
        os.fsync(f.fileno())
    fresh.replace(path)
