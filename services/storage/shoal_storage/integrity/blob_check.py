"""Hash a blob's file leaf by leaf, around what the disk cannot read."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec

from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.blob_lookup import find_blob
from shoal_common.store.leaf_hash import HASH_BYTES
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.blob_stat import blob_file_stat
from shoal_storage.files.hashing import hash_ahead
from shoal_storage.ledger.entries import BlobFileStat
from shoal_storage.store.store import Store

_UNREADABLE = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
"""Read errors that mean bad bytes: a failing device, or the file system's own checksums."""
_MAX_UNREADABLE_LEAVES = 64
"""A device may take a minute over each unreadable leaf: after this many the rest counts as bad."""


class VerificationResult(msgspec.Struct, frozen=True):
    """Result of hashing a file in a blob's place."""

    sha256: str
    stat: BlobFileStat
    """Of the file that was hashed."""
    intact: bool
    leaf_hashes: bytes = b""
    """BLAKE3 of each leaf, concatenated; for an unreadable leaf, the hash of no bytes."""
    has_leaf_hash_file: bool = False
    """Whether the leaf hash file in `leaves/` matches this very file."""
    good_leaves: Bitmap | None = None
    """Leaves of a corrupt blob that still match their recorded hashes; None if no hashes tell."""
    reason: str = "its bytes have another hash"
    """Why a file is corrupt."""

    @property
    def bad_leaf_count(self) -> int:
        """Leaves to download again; all of them when no hashes tell which are good."""
        count = 0 if self.intact else leaf_count(self.stat.size_bytes)
        return count if self.good_leaves is None else sum(leaf not in self.good_leaves for leaf in range(count))


def hash_blob(store: Store, sha256: str, before_leaf: Callable[[int], None]) -> VerificationResult | None:
    """Hash a blob, of the store or of a library, as the disk holds it now; return None if its file is gone.

    `before_leaf` is called with the byte count of each leaf before it is hashed. It may block, and raise to abort.
    """
    store_path = store.layout.blob(sha256)
    digest, leaf_hashes = hashlib.sha256(), bytearray()
    try:
        path = store_path if store_path.is_file() else find_blob(store.layout, sha256)
        status = path.lstat()
        recorded = leaf_hash_file.read(store.layout, sha256, status.st_size)
        leaf_data = _read_leaves(path, status.st_ino, status.st_size, _MAX_UNREADABLE_LEAVES if recorded else 0)
        with closing(hash_ahead(leaf_data)) as hashed:
            for leaf, leaf_hash in hashed:
                store.check_stopping()
                before_leaf(len(leaf))
                digest.update(leaf)
                leaf_hashes += leaf_hash
    except FileNotFoundError:
        return None
    intact = digest.hexdigest() == sha256
    good = None if intact or recorded is None else _good_leaves(status.st_size, recorded, bytes(leaf_hashes))
    listed = intact and recorded == bytes(leaf_hashes) and leaf_hash_file.is_verified(store.layout, sha256)
    stat = blob_file_stat(sha256, status, store.layout.volume_of(sha256))
    return VerificationResult(sha256, stat, intact, bytes(leaf_hashes), listed, good)


def _good_leaves(size_bytes: int, recorded: bytes, current: bytes) -> Bitmap | None:
    """Return the leaves that match their recorded hashes; None if none or (the record is wrong) all do."""
    good, size = Bitmap(size_bytes), HASH_BYTES
    for leaf in range(good.leaf_count):
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
