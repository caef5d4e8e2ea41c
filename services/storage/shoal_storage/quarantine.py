"""Hash a blob again and quarantine it if corrupt. Blocking: runs in threads.

    quarantine/<sha256>    a file that did not hash to its name; deleted once good bytes arrive or nothing needs them

Order of quarantining: unlink the blob's files from views, fsync their directories, rename into quarantine/, fsync
both directories. Hard links and reflinks share the bytes: a view or lease that kept one would go on being loaded.
`repair.py` records the leaves that are still good and repairs the blob with them.
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
"""Read errors that mean bad bytes: a failing device, or the file system's own checksums."""
_MAX_UNREADABLE_LEAVES = 64
"""A device may take a minute over each unreadable leaf: after this many the rest counts as bad."""


class Checked(msgspec.Struct, frozen=True):
    """Result of hashing a blob, with the identity of the hashed file."""

    sha256: str
    size_bytes: int
    intact: bool
    inode: int
    mtime_ns: int
    leaves: bytes
    """BLAKE3 of each leaf, concatenated; for an unreadable leaf, the hash of no bytes."""
    listed: bool
    """Whether the leaf hash file in `leaves/` matches this very file."""
    good: Bitmap | None = None
    """Leaves of a corrupt blob that still match their recorded hashes; None if no hashes tell."""

    @property
    def bad_leaf_count(self) -> int:
        """Leaves to download again; all of them when no hashes tell which are good."""
        count = 0 if self.intact else leaf_count(self.size_bytes)
        return count if self.good is None else sum(leaf not in self.good for leaf in range(count))


def check(disk: Disk, sha256: str, pace: Callable[[int], None]) -> Checked | None:
    """Hash a blob, of the store or of a library, as the disk holds it now; return None if its file is gone.

    `before_leaf` is called with the byte count of each leaf before it is hashed. It may block, and raise to abort.
    """
    store_path = disk.layout.blob(sha256)
    digest, leaf_hashes = hashlib.sha256(), bytearray()
    try:
        path = store_path if store_path.is_file() else find_blob(disk.layout, sha256)
        status = path.lstat()
        recorded = leaves.read(disk.layout, sha256, status.st_size)
        leaf_data = _read_leaves(path, status.st_ino, status.st_size, _MAX_UNREADABLE_LEAVES if recorded else 0)
        with closing(hashed_ahead(leaf_data)) as hashed:
            for leaf, leaf_hash in hashed:
                disk.keep_on()
                pace(len(leaf))
                digest.update(leaf)
                leaf_hashes += leaf_hash
    except FileNotFoundError:
        return None
    intact = digest.hexdigest() == sha256
    good = None if intact or recorded is None else _good_leaves(status.st_size, recorded, bytes(leaf_hashes))
    listed = intact and recorded == bytes(leaf_hashes) and leaves.proves(disk.layout, sha256)
    return Checked(
        sha256, status.st_size, intact, status.st_ino, status.st_mtime_ns, bytes(leaf_hashes), listed, good
    )


def _good_leaves(size_bytes: int, recorded: bytes, current: bytes) -> Bitmap | None:
    """Return the leaves that match their recorded hashes; None if none or (the record is wrong) all do."""
    good, size = Bitmap(size_bytes), HASH_BYTES
    for leaf in range(good.leaves):
        if current[leaf * size : (leaf + 1) * size] == recorded[leaf * size : (leaf + 1) * size]:
            good.add(leaf)
    return good if good.have_bytes and not good.complete else None


def _read_leaves(path: Path, inode: int, size_bytes: int, max_unreadable: int) -> Iterator[bytes]:
    """Yield the leaves of a file, bypassing the page cache where possible; an unreadable leaf is empty.

    The file is open only while a leaf is read, since a deleted open file keeps its space. Pages that were read are
    dropped from the page cache, which others use better; pages that a process has mapped stay.
    """
    offset = unreadable = 0
    while True:
        with path.open("rb", buffering=0) as f:
            if os.fstat(f.fileno()).st_ino != inode:
                raise FileNotFoundError(errno.ENOENT, "the file was replaced", str(path))
            _drop_page_cache(f.fileno(), offset)
            try:
                leaf = os.pread(f.fileno(), LEAF_BYTES, offset)
            except OSError as e:
                if e.errno not in _UNREADABLE:
                    raise
                unreadable += 1
                leaf = b""
            else:
                if not leaf:
                    return
            _drop_page_cache(f.fileno(), offset)
        yield leaf
        offset += LEAF_BYTES
        if not leaf and (unreadable > max_unreadable or offset >= size_bytes):
            return


def _drop_page_cache(fd: int, offset: int) -> None:
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(fd, offset, LEAF_BYTES, os.POSIX_FADV_DONTNEED)


def set_aside(disk: Disk, checked: Checked, manifests: Iterable[Manifest], leases: Iterable[Lease] = ()) -> bool:
    """Move a corrupt blob to quarantine, durably: nothing serves or loads it then. False if the file changed."""
    paths = disk.layout
    path = paths.blob(checked.sha256)
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not _is_checked_file(status, checked):
        return False
    for directory in unlink(places_of(paths, checked.sha256, manifests, leases)):
        if directory.exists():
            sync(directory)
    paths.set_aside(checked.sha256).parent.mkdir(exist_ok=True)
    # An older bitmap under this name does not describe these bytes.
    disk.drop_set_aside(checked.sha256)
    path.replace(paths.set_aside(checked.sha256))
    sync(paths.set_aside(checked.sha256).parent)
    sync(path.parent)
    leaves.remove(paths, checked.sha256)
    return True


def list_leaves(disk: Disk, checked: Checked) -> None:
    """Write the leaf hashes of an intact blob, unless its file has changed since."""
    try:
        status = disk.layout.blob(checked.sha256).lstat()
    except FileNotFoundError:
        return
    if _is_checked_file(status, checked):
        leaves.write(disk.layout, checked.sha256, checked.leaves, checked.mtime_ns)


def _is_checked_file(status: os.stat_result, checked: Checked) -> bool:
    return (status.st_ino, status.st_mtime_ns) == (checked.inode, checked.mtime_ns)


def set_aside_earlier(disk: Disk) -> set[str]:
    """Return the blobs in quarantine, in the store and its volumes; called at start."""
    return set().union(*(set_aside_in(disk, volume_id) for volume_id, _ in disk.layout.all()))


def set_aside_in(disk: Disk, volume_id: str) -> set[str]:
    """Return the blobs in quarantine on one volume; delete bitmaps without a blob and temporary files."""
    quarantined, bitmaps = set(), []
    root, paths = disk.layout.of(volume_id), disk.layout
    if root.quarantine.is_dir():
        for path in root.quarantine.iterdir():
            if path.name.startswith(".") and path.suffix == ".new":
                path.unlink(missing_ok=True)
            elif path.suffix == ".have":
                bitmaps.append(path)
            else:
                try:
                    quarantined.add(check_blob(path.name))
                except BadName:
                    continue
    for path in bitmaps:
        if path.stem not in quarantined:
            path.unlink(missing_ok=True)
    for blob in quarantined:
        if volume_id and not paths.blob(blob).exists() and not paths.partial(blob).exists():
            paths.where.setdefault(blob, volume_id)
    return quarantined
