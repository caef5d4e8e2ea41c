"""The stat of a blob's file: what shows that it is still the file that was verified."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal_common.errors import BadName
from shoal_common.names import check_blob
from shoal_common.store.store_paths import Layout
from shoal_common.store.verification_stamp import proven
from shoal_storage.files.volume_paths import StoreLayout
from shoal_storage.ledger.entries import Stamp

SHA256 = re.compile(r"[0-9a-f]{64}")


def stamp_of(sha256: str, status: os.stat_result, volume_id: str = "") -> Stamp:
    """Return the stat of a blob's file, on a volume or in the store itself ("")."""
    return Stamp(
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        proven=proven(sha256, status),
        further=volume_id,
    )


def blob_stamp(layout: StoreLayout, path: Path) -> Stamp | None:
    """Return the stat of a regular file with a blob's name in its place; None for anything else."""
    try:
        if not SHA256.fullmatch(path.name) or path != layout.blob(path.name):
            return None
        status = path.lstat()
    except OSError:
        return None
    volume_id = layout.where.get(path.name, "")
    return stamp_of(path.name, status, volume_id) if stat.S_ISREG(status.st_mode) else None


def blobs_in(layout: Layout, volume_id: str, on_foreign: Callable[[Path], None] = lambda _: None) -> dict[str, Stamp]:
    """Return the regular files of a volume with a blob's name and place; pass every other file to `on_foreign`."""
    blobs: dict[str, Stamp] = {}
    for directory in entries_of(layout.blobs):
        if not directory.is_dir(follow_symlinks=False):
            on_foreign(Path(directory.path))
            continue
        for entry in entries_of(Path(directory.path)):
            if SHA256.fullmatch(entry.name) and entry.name[:2] == directory.name:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    blobs[entry.name] = stamp_of(entry.name, status, volume_id)
                    continue
            on_foreign(Path(entry.path))
    return blobs


def entries_of(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Yield a directory's entries by name; nothing if it does not exist. Raises OSError."""
    try:
        with os.scandir(directory) as scanned:
            entries = sorted(scanned, key=lambda e: e.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from entries


def files_of(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Yield everything below a directory that is not a directory itself; nothing for a plain file."""
    for entry in entries_of(directory):
        if entry.is_dir(follow_symlinks=False):
            yield from files_of(Path(entry.path))
        else:
            yield entry


def is_blob_name(name: str) -> bool:
    try:
        check_blob(name)
    except BadName:
        return False
    return True


PROVEN_MODE = 0o444
