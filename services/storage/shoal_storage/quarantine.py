"""Blobs looked at again, and those that are not what they are called set aside. Blocking: runs in threads.

    quarantine/<sha256>    what did not hash to its name; goes when good bytes have come, or nothing wants them back

Order of setting aside: the blob's files in views, fsync of their directories, rename into quarantine/, fsync of both
directories. Hard links and reflinks share the bytes: a view that kept one would go on being loaded, a lease's too.
`repair.py` has which leaves are good all the same, and how the blob is repaired with them.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from shoal_common.blobs import find_blob
from shoal_common.errors import BadName
from shoal_common.layout import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.leaves import HASH_BYTES
from shoal_common.messages.records import Manifest
from shoal_common.names import check_blob
from shoal_storage import leaves
from shoal_storage.digests import hashed_ahead
from shoal_storage.disk import Disk
from shoal_storage.durable import sync
from shoal_storage.leases import Lease
from shoal_storage.views import places_of, unlink

_UNREADABLE = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
"""What a file system says of bytes that the device, or its own checksums, cannot vouch for."""
_UNREADABLE_AT_MOST = 64
"""A device may take a minute over each leaf that it cannot read: after so many the rest counts as bad."""


class Checked(msgspec.Struct, frozen=True):
    """What was found of a blob, and which file it was."""

    sha256: str
    size_bytes: int
    intact: bool
    inode: int
    mtime_ns: int
    leaves: bytes
    """BLAKE3 of each leaf, one after the other; of an unreadable one, that of nothing."""
    listed: bool
    """Whether `leaves/` says the same of this very file."""
    good: Bitmap | None = None
    """Of a corrupt blob, the leaves that are as they were when it came; None when nothing tells."""

    @property
    def bad_leaf_count(self) -> int:
        """Leaves that have to come anew; all of them when nothing tells which are good."""
        count = 0 if self.intact else leaf_count(self.size_bytes)
        return count if self.good is None else sum(leaf not in self.good for leaf in range(count))


def check(disk: Disk, sha256: str, pace: Callable[[int], None]) -> Checked | None:
    """Hash a blob, of the store or adopted, as the disk holds it now; None when there is no such file, or no longer.

    `pace` is given the bytes of each leaf before they are hashed. It may wait, and raise to end this.
    """
    own = disk.layout.blob(sha256)
    digest, now = hashlib.sha256(), bytearray()
    try:
        path = own if own.is_file() else find_blob(disk.layout, sha256)
        found = path.lstat()
        listed = leaves.read(disk.layout, sha256, found.st_size)
        steps = _steps(path, found.st_ino, found.st_size, _UNREADABLE_AT_MOST if listed else 0)
        with closing(hashed_ahead(steps)) as hashed:
            for leaf, its_hash in hashed:
                disk.keep_on()
                pace(len(leaf))
                digest.update(leaf)
                now += its_hash
    except FileNotFoundError:
        return None
    intact = digest.hexdigest() == sha256
    good = None if intact or listed is None else _good_leaves(found.st_size, listed, bytes(now))
    same = intact and listed == bytes(now) and leaves.proves(disk.layout, sha256)
    return Checked(sha256, found.st_size, intact, found.st_ino, found.st_mtime_ns, bytes(now), same, good)


def _good_leaves(size_bytes: int, listed: bytes, now: bytes) -> Bitmap | None:
    """The leaves that are as they are listed; None when all of them are, and so the list is wrong, or none is."""
    good, size = Bitmap(size_bytes), HASH_BYTES
    for leaf in range(good.leaves):
        if now[leaf * size : (leaf + 1) * size] == listed[leaf * size : (leaf + 1) * size]:
            good.add(leaf)
    return good if good.have_bytes and not good.complete else None


def _steps(path: Path, inode: int, size_bytes: int, unreadable_at_most: int) -> Iterator[bytes]:
    """The leaves of a file, read from the device where that can be asked for; an unreadable one is empty.

    It is open only while a leaf is read: an open file that is deleted keeps its space. What was read is not kept in
    memory, for which others have a better use; pages that a process has mapped stay there.
    """
    at_byte = unreadable = 0
    while True:
        with path.open("rb", buffering=0) as f:
            if os.fstat(f.fileno()).st_ino != inode:
                raise FileNotFoundError(errno.ENOENT, "it is another file by now", str(path))
            _forget_cached(f.fileno(), at_byte)
            try:
                leaf = os.pread(f.fileno(), LEAF_BYTES, at_byte)
            except OSError as e:
                if e.errno not in _UNREADABLE:
                    raise
                unreadable += 1
                leaf = b""
            else:
                if not leaf:
                    return
            _forget_cached(f.fileno(), at_byte)
        yield leaf
        at_byte += LEAF_BYTES
        if not leaf and (unreadable > unreadable_at_most or at_byte >= size_bytes):
            return


def _forget_cached(fd: int, at_byte: int) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(fd, at_byte, LEAF_BYTES, os.POSIX_FADV_DONTNEED)


def set_aside(disk: Disk, checked: Checked, manifests: Iterable[Manifest], leases: Iterable[Lease] = ()) -> bool:
    """Move a corrupt blob where nothing serves or loads it, durably. False: it is not that file any more."""
    lay = disk.layout
    path = lay.blob(checked.sha256)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not _is_that(found, checked):
        return False
    for directory in unlink(places_of(lay, checked.sha256, manifests, leases)):
        if directory.exists():
            sync(directory)
    lay.set_aside(checked.sha256).parent.mkdir(exist_ok=True)
    # What was set aside under this name before says nothing of these bytes.
    disk.drop_set_aside(checked.sha256)
    path.replace(lay.set_aside(checked.sha256))
    sync(lay.set_aside(checked.sha256).parent)
    sync(path.parent)
    leaves.remove(lay, checked.sha256)
    return True


def list_leaves(disk: Disk, checked: Checked) -> None:
    """Keep the leaves' hashes of a blob that is intact, unless it is another file by now."""
    try:
        found = disk.layout.blob(checked.sha256).lstat()
    except FileNotFoundError:
        return
    if _is_that(found, checked):
        leaves.write(disk.layout, checked.sha256, checked.leaves, checked.mtime_ns)


def _is_that(found: os.stat_result, checked: Checked) -> bool:
    return (found.st_ino, found.st_mtime_ns) == (checked.inode, checked.mtime_ns)


def set_aside_earlier(disk: Disk) -> set[str]:
    """At start: the blobs that are in quarantine, in the store and in its further roots."""
    return set().union(*(set_aside_in(disk, further) for further, _ in disk.layout.all()))


def set_aside_in(disk: Disk, further: str) -> set[str]:
    """The blobs that are in quarantine in one root. Bitmaps without theirs, and what a kill left half written, go."""
    found, bitmaps = set(), []
    root, lay = disk.layout.of(further), disk.layout
    if root.quarantine.is_dir():
        for path in root.quarantine.iterdir():
            if path.name.startswith(".") and path.suffix == ".new":
                path.unlink(missing_ok=True)
            elif path.suffix == ".have":
                bitmaps.append(path)
            else:
                try:
                    found.add(check_blob(path.name))
                except BadName:
                    continue
    for path in bitmaps:
        if path.stem not in found:
            path.unlink(missing_ok=True)
    for blob in found:
        if further and not lay.blob(blob).exists() and not lay.partial(blob).exists():
            lay.where.setdefault(blob, further)
    return found
