"""Find and open a blob's file: a verified file on a volume (`verification_stamp.py`), else a file of a library.

`libraries/blobs/ab/<sha256>` is a small JSON file, a `LibraryBlob`: the absolute path of a file with this hash, and
its size, mtime and inode when it was hashed. The file counts as the blob only while all of them are unchanged. A file
that has since become a link is not followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Protocol

from shoal_common.errors import BadMessage
from shoal_common.messages import WireStruct, decode
from shoal_common.store.store_paths import StorePaths
from shoal_common.store.verification_stamp import has_stamp

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


class LibraryBlob(WireStruct):
    """Where a library holds a blob: `libraries/blobs/ab/<sha256>`."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int = 0
    """0 if the file system invents inode numbers."""


class FileFingerprint(Protocol):
    """Size, mtime and inode of a file when it was hashed or listed; inode 0 is not compared."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def inode(self) -> int: ...


def is_unchanged(status: os.stat_result, known: FileFingerprint) -> bool:
    """Return whether a file's size, mtime and inode are still the known ones."""
    return (
        stat.S_ISREG(status.st_mode)
        and (status.st_size, status.st_mtime_ns) == (known.size_bytes, known.mtime_ns)
        and known.inode in (0, status.st_ino)
    )


def read_library_blob(layout: StorePaths, sha256: str) -> LibraryBlob | None:
    """Return the record of a blob in a library; None if there is none. Raises BadName."""
    try:
        return decode(layout.library_blob(sha256).read_bytes(), LibraryBlob)
    except (FileNotFoundError, NotADirectoryError, BadMessage):
        return None


def read_volumes(layout: StorePaths) -> list[tuple[str, Path]]:
    """Return id and path of each volume that a store records; its disk may not be mounted."""
    volumes = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for link in sorted(layout.volumes.iterdir()):
            with suppress(OSError):  # not a link
                volumes.append((link.name, link.readlink()))
    return volumes


def _candidate_paths(layout: StorePaths, sha256: str) -> Iterator[Path]:
    """Yield the paths where a blob's file may be, the store's own first."""
    yield layout.blob(sha256)
    for _, volume in read_volumes(layout):
        yield StorePaths(volume).blob(sha256)


def find_blob(layout: StorePaths, sha256: str) -> Path:
    """Return the file with a blob's bytes. Raises BadName, FileNotFoundError, or OSError if it cannot be read."""
    own = layout.blob(sha256)
    for path in _candidate_paths(layout, sha256):
        with suppress(FileNotFoundError, NotADirectoryError):
            if has_stamp(sha256, path.lstat()):
                return path
    record = read_library_blob(layout, sha256)
    if record is not None and is_unchanged(os.lstat(record.path), record):
        return Path(record.path)
    raise FileNotFoundError(errno.ENOENT, "no verified file has this blob", str(own))


def open_blob(layout: StorePaths, sha256: str) -> FileIO:
    """Open a blob's file for reading. Raises BadName, FileNotFoundError, or OSError if it cannot be opened."""
    for path in _candidate_paths(layout, sha256):
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            file = FileIO(path)
            if has_stamp(sha256, os.fstat(file.fileno())):
                return file
            file.close()
    record = read_library_blob(layout, sha256)
    if record is None:
        raise FileNotFoundError(errno.ENOENT, "no verified file has this blob", sha256)
    file = open_regular_file(record.path)
    if not is_unchanged(os.fstat(file.fileno()), record):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "the file has changed since it was hashed", record.path)
    return file


def open_regular_file(path: str) -> FileIO:
    """Open a regular file, without following a link and without blocking. Raises FileNotFoundError for any other."""
    try:
        file = FileIO(path, opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as e:
        if e.errno in _GONE:
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
    return file
