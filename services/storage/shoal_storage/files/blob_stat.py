"""The stat of a blob's file: what shows that it is still the file that was verified."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal_common.errors import BadName
from shoal_common.names import check_blob
from shoal_common.store.store_paths import StorePaths
from shoal_common.store.verification_stamp import has_stamp
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.ledger.entries import BlobFileStat

SHA256 = re.compile(r"[0-9a-f]{64}")


def blob_file_stat(sha256: str, status: os.stat_result, volume_id: str = "") -> BlobFileStat:
    """Return the stat of a blob's file, on a volume or in the store itself ("")."""
    return BlobFileStat(
        size_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        is_verified=has_stamp(sha256, status),
        volume_id=volume_id,
    )


def stat_blob(layout: VolumePaths, path: Path) -> BlobFileStat | None:
    """Return the stat of a regular file with a blob's name in its place; None for anything else."""
    try:
        if not SHA256.fullmatch(path.name) or path != layout.blob(path.name):
            return None
        status = path.lstat()
    except OSError:
        return None
    volume_id = layout.volume_of(path.name)
    return blob_file_stat(path.name, status, volume_id) if stat.S_ISREG(status.st_mode) else None


def list_blobs(
    layout: StorePaths, volume_id: str, on_foreign: Callable[[Path], None] = lambda _: None
) -> dict[str, BlobFileStat]:
    """Return the regular files of a volume with a blob's name and place; pass every other file to `on_foreign`."""
    blobs: dict[str, BlobFileStat] = {}
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
                    blobs[entry.name] = blob_file_stat(entry.name, status, volume_id)
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


VERIFIED_MODE = 0o444
