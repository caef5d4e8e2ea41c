"""The verification stamp: the nanoseconds of a blob file's mtime show that storage has hashed all of it.

A file mode would not do: `cp` gives a copy the mode of its source from the first byte on. The nanoseconds are a
checksum of the blob's name and its file's inode, size and whole second. A copy has another inode, and every write
changes the mtime, so neither carries the stamp, and one stat tells. The date that people see stays true.

On a file system without nanoseconds no blob can carry the stamp: none is served from there.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_NS_PER_S = 1_000_000_000


def has_stamp(sha256: str, status: os.stat_result) -> bool:
    """Return whether the file with this stat was verified under this name, and not written to since."""
    return status.st_mtime_ns == _stamp_ns(sha256, status)


def write_stamp(sha256: str, path: Path) -> bool:
    """Stamp a verified file. Returns False if the file system does not keep the stamp. Raises OSError."""
    status = path.lstat()
    os.utime(path, ns=(status.st_atime_ns, _stamp_ns(sha256, status)), follow_symlinks=False)
    return has_stamp(sha256, path.lstat())


def clear_stamp(sha256: str, path: Path) -> None:
    """Clear the stamp of a file that does not hash to its name. Raises OSError."""
    status = path.lstat()
    if has_stamp(sha256, status):
        other_ns = status.st_mtime_ns // _NS_PER_S * _NS_PER_S + (status.st_mtime_ns + 1) % _NS_PER_S
        os.utime(path, ns=(status.st_atime_ns, other_ns), follow_symlinks=False)


def _stamp_ns(sha256: str, status: os.stat_result) -> int:
    whole_s = status.st_mtime_ns // _NS_PER_S
    stamped = f"{sha256} {status.st_ino} {status.st_size} {whole_s}".encode()
    return whole_s * _NS_PER_S + int.from_bytes(hashlib.sha256(stamped).digest()[:8]) % _NS_PER_S
