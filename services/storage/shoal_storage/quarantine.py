"""Blobs looked at again, and those that are not what they are called set aside. Blocking: runs in threads.

    quarantine/<sha256>    what did not hash to its name; goes when good bytes have come, or nothing wants them back

Order of setting aside: the blob's files in views, fsync of their directories, rename into quarantine/, fsync of both
directories. Hard links share the bytes: a view that kept one would go on being loaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from shoal_common.blobs import find_blob
from shoal_common.errors import BadName
from shoal_common.messages.records import Manifest
from shoal_common.names import check_blob
from shoal_storage.disk import Disk, sync_directory

_STEP_BYTES = 1 << 20
_UNREADABLE = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
"""What a file system says of bytes that the device, or its own checksums, cannot vouch for."""


class Checked(msgspec.Struct, frozen=True):
    """What was found of a blob, and which file it was."""

    sha256: str
    size_bytes: int
    intact: bool
    inode: int
    changed_ns: int


def check(disk: Disk, sha256: str, pace: Callable[[int], None]) -> Checked | None:
    """Hash a blob, of the store or adopted, as the disk holds it now; None when there is no such file, or no longer.

    `pace` is given the bytes of each step before they are hashed. It may wait, and raise to end this.
    """
    digest = hashlib.sha256()
    try:
        path = find_blob(disk.layout, sha256)
        found = path.lstat()
        for chunk in _steps(path, found.st_ino):
            disk.keep_on()
            pace(len(chunk))
            digest.update(chunk)
        intact = digest.hexdigest() == sha256
    except FileNotFoundError:
        return None
    except OSError as e:
        if e.errno not in _UNREADABLE:
            raise
        intact = False
    return Checked(sha256, found.st_size, intact, found.st_ino, found.st_mtime_ns)


def _steps(path: Path, inode: int) -> Iterator[bytes]:
    """The bytes of a file, read from the device where that can be asked for, 1 MiB at a time.

    It is open only while a step is read: an open file that is deleted keeps its space. What was read is not kept in
    memory, for which others have a better use; pages that a process has mapped stay there.
    """
    at_byte = 0
    while True:
        with path.open("rb", buffering=0) as f:
            if os.fstat(f.fileno()).st_ino != inode:
                raise FileNotFoundError(errno.ENOENT, "it is another file by now", str(path))
            _forget_cached(f.fileno(), at_byte)
            chunk = os.pread(f.fileno(), _STEP_BYTES, at_byte)
            _forget_cached(f.fileno(), at_byte)
        if not chunk:
            return
        yield chunk
        at_byte += len(chunk)


def _forget_cached(fd: int, at_byte: int) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(fd, at_byte, _STEP_BYTES, os.POSIX_FADV_DONTNEED)


def set_aside(disk: Disk, checked: Checked, manifests: Iterable[Manifest]) -> bool:
    """Move a corrupt blob where nothing serves or loads it, durably. False: it is not that file any more."""
    lay = disk.layout
    path = lay.blob(checked.sha256)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if (found.st_ino, found.st_mtime_ns) != (checked.inode, checked.changed_ns):
        return False
    changed: set[Path] = set()
    for manifest in manifests:
        for file in manifest.files:
            if file.sha256 == checked.sha256:
                linked = lay.view_file(manifest, file.path)
                linked.unlink(missing_ok=True)
                changed.add(linked.parent)
    for directory in changed:
        if directory.exists():
            sync_directory(directory)
    lay.quarantine.mkdir(exist_ok=True)
    path.replace(lay.quarantine / checked.sha256)
    sync_directory(lay.quarantine)
    sync_directory(path.parent)
    return True


def set_aside_earlier(disk: Disk) -> set[str]:
    """Blobs that are in quarantine."""
    found = set()
    if disk.layout.quarantine.is_dir():
        for path in disk.layout.quarantine.iterdir():
            try:
                found.add(check_blob(path.name))
            except BadName:
                continue
    return found


def drop(disk: Disk, sha256: str) -> None:
    """Remove what was set aside. Absent already is fine."""
    (disk.layout.quarantine / check_blob(sha256)).unlink(missing_ok=True)
