"""Where a blob's bytes are: in `blobs/` of store or further root, proven (`proof.py`), else in a read-only root.

`adopted/blobs/ab/<sha256>` is a small JSON file, an `AdoptedBlob`: the absolute path of a file that hashed to this
name, and its size, time of change and inode at that moment. Only as long as all of them still are so is the file that
blob. A file that became a link meanwhile is not followed.
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
from shoal_common.layout import Layout
from shoal_common.messages import Message, decode
from shoal_common.proof import proven

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


class AdoptedBlob(Message):
    """`adopted/blobs/ab/<sha256>`."""

    path: str
    size_bytes: int
    mtime_ns: int
    inode: int = 0
    """0 where the file system makes its numbers up."""


class Known(Protocol):
    """What is known of a file since it was hashed, or listed. `inode` 0: not to be compared."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def inode(self) -> int: ...


def is_as_it_was(found: os.stat_result, known: Known) -> bool:
    """Whether a file still is the one that is known, as far as its size, time and inode tell."""
    return (
        stat.S_ISREG(found.st_mode)
        and (found.st_size, found.st_mtime_ns) == (known.size_bytes, known.mtime_ns)
        and known.inode in (0, found.st_ino)
    )


def adopted_blob(layout: Layout, sha256: str) -> AdoptedBlob | None:
    """What is written of a blob in a read-only root; None when nothing is. Raises BadName."""
    try:
        return decode(layout.adopted_blob(sha256).read_bytes(), AdoptedBlob)
    except (FileNotFoundError, NotADirectoryError, BadMessage):
        return None


def further_roots(layout: Layout) -> list[tuple[str, Path]]:
    """The further roots that a store remembers, by their ids, and where they are when their disks are mounted."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for link in sorted(layout.further.iterdir()):
            with suppress(OSError):  # not a link
                found.append((link.name, link.readlink()))
    return found


def _places(layout: Layout, sha256: str) -> Iterator[Path]:
    """Where a blob's file may be, the store's own place first."""
    yield layout.blob(sha256)
    for _, root in further_roots(layout):
        yield Layout(root).blob(sha256)


def find_blob(layout: Layout, sha256: str) -> Path:
    """The file with a blob's bytes. Raises BadName, FileNotFoundError, other OSErrors when it cannot be looked at."""
    own = layout.blob(sha256)
    for path in _places(layout, sha256):
        with suppress(FileNotFoundError, NotADirectoryError):
            if proven(sha256, path.lstat()):
                return path
    record = adopted_blob(layout, sha256)
    if record is not None and is_as_it_was(os.lstat(record.path), record):
        return Path(record.path)
    raise FileNotFoundError(errno.ENOENT, "no file has this blob", str(own))


def open_blob(layout: Layout, sha256: str) -> FileIO:
    """A blob's bytes, open to be read. Raises BadName, FileNotFoundError, other OSErrors when it cannot be opened."""
    for path in _places(layout, sha256):
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            file = FileIO(path)
            if proven(sha256, os.fstat(file.fileno())):
                return file
            file.close()
    record = adopted_blob(layout, sha256)
    if record is None:
        raise FileNotFoundError(errno.ENOENT, "no file has this blob, verified", sha256)
    file = open_plain(record.path)
    if not is_as_it_was(os.fstat(file.fileno()), record):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "it is another file by now", record.path)
    return file


def open_plain(path: str) -> FileIO:
    """Open a regular file, never through a link at its end, never waiting. Raises FileNotFoundError for any other."""
    try:
        file = FileIO(path, opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as e:
        if e.errno in _GONE:
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "it is not a file", path)
    return file
