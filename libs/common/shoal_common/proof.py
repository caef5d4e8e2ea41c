"""How a blob's file shows that storage has hashed all of it: by the nanoseconds of its mtime.

A mode would not do: `cp` gives a copy the mode of its source from the first byte on. The nanoseconds are a check of
the blob's name and of its file's inode, size and whole second. A copy has another inode, and whatever writes to the
file changes its time: neither shows the proof, and one stat tells. The date that people see stays true.

On a file system that keeps no nanoseconds no blob can show it: none is served from there.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_NS_PER_S = 1_000_000_000


def proven(sha256: str, found: os.stat_result) -> bool:
    """Whether the file with this stat was hashed under this name, and not written to since."""
    return found.st_mtime_ns == _proof_ns(sha256, found)


def prove(sha256: str, path: Path) -> bool:
    """Give a file that was hashed its proof. False: the file system does not keep it. Raises OSError."""
    found = path.lstat()
    os.utime(path, ns=(found.st_atime_ns, _proof_ns(sha256, found)), follow_symlinks=False)
    return proven(sha256, path.lstat())


def disprove(sha256: str, path: Path) -> None:
    """Take the proof from a file that shows it and does not hash to its name. Raises OSError."""
    found = path.lstat()
    if proven(sha256, found):
        other_ns = found.st_mtime_ns // _NS_PER_S * _NS_PER_S + (found.st_mtime_ns + 1) % _NS_PER_S
        os.utime(path, ns=(found.st_atime_ns, other_ns), follow_symlinks=False)


def _proof_ns(sha256: str, found: os.stat_result) -> int:
    at_s = found.st_mtime_ns // _NS_PER_S
    facts = f"{sha256} {found.st_ino} {found.st_size} {at_s}".encode()
    return at_s * _NS_PER_S + int.from_bytes(hashlib.sha256(facts).digest()[:8]) % _NS_PER_S
