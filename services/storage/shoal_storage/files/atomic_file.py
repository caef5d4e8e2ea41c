"""Small files and directory entries that survive a power cut once these functions return. Blocking."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shoal_common.host.private_files import DIRECTORY_MODE, open_private


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(directory: Path, within: Path | None = None) -> None:
    """Make a directory and its missing parents, durably: a file is lost if a directory entry above it is.

    `within` must exist, so that nothing is written beside an unmounted disk. Raises FileNotFoundError if it does not.
    """
    if not directory.is_dir():
        if directory == within:
            raise FileNotFoundError(errno.ENOENT, "the directory is missing", str(within))
        make_directory(directory.parent, within)
        directory.mkdir(DIRECTORY_MODE, exist_ok=True)
        fsync_path(directory.parent)


def replace_file(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
    """Replace a small file atomically and durably, with this mtime.

    A kill may leave `.<name>.new` beside it.
    """
    replace_file_unsynced(path, data, mtime_ns)
    fsync_path(path.parent)


def replace_file_unsynced(path: Path, data: bytes, mtime_ns: int | None = None) -> None:
    """Like `replace_file`, but the directory entry is durable only after the directory is synced."""
    new_path = path.with_name(f".{path.name}.new")
    with os.fdopen(open_private(new_path, os.O_WRONLY | os.O_TRUNC), "wb") as f:
        f.write(data)
        f.flush()
        if mtime_ns is not None:
            os.utime(f.fileno(), ns=(mtime_ns, mtime_ns))
        os.fsync(f.fileno())
    new_path.replace(path)
