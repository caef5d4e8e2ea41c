"""What this node can send of a blob: all of a verified one, or the leaves in a partial blob's relay bitmap.

Opened again for each request, so that discarded data is not served (I1). All calls block: they run in threads.
"""

from __future__ import annotations

import base64
import errno
import os
import stat
from contextlib import suppress
from io import FileIO

from shoal_common.errors import BadMessage
from shoal_common.identity.seals import MAX_SEAL_BYTES, to_text
from shoal_common.messages import decode
from shoal_common.messages.manifest import LeafListSeal
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap, leaf_count
from shoal_common.store.blob_lookup import open_blob
from shoal_common.store.leaf_hash import HASH_BYTES, leaf_list_size
from shoal_common.store.leaf_set import from_bitmap, leaf_range
from shoal_common.store.relay_bitmap import parse_relay_bitmap
from shoal_common.store.store_paths import StorePaths

GIT_PREFIX = "git-"
"""Prefix of a blob whose sha256 is unknown: it can only be a partial one."""
_MAX_READY_BYTES = 1 << 20
"""Relay bitmap of a blob of 8 TiB."""


class BlobContent:
    """A blob's open file. `ready` is the set of leaves that can be sent; None for a complete blob."""

    def __init__(self, blob: str, file: FileIO, size_bytes: int, ready: int | None) -> None:
        self.blob, self.file, self.size_bytes, self.relayable = blob, file, size_bytes, ready

    @property
    def leaves(self) -> int:
        """Set of leaves that can be sent."""
        return leaf_range(0, leaf_count(self.size_bytes)) if self.relayable is None else self.relayable

    def has(self, start: int, end: int) -> bool:
        """Return whether all of bytes [start, end) can be sent."""
        if self.relayable is None:
            return True
        wanted = leaf_range(start // LEAF_BYTES, -(-end // LEAF_BYTES))
        return wanted & self.relayable == wanted

    @property
    def is_discarded(self) -> bool:
        """Whether a partial blob's data was deleted since it was opened; never for a complete blob."""
        return self.relayable is not None and os.fstat(self.file.fileno()).st_nlink == 0

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the blob, whichever part of it is sent."""
        headers = {"ETag": f'"{self.blob}"', "Accept-Ranges": "bytes"}
        if self.relayable is None:
            digest = base64.b64encode(bytes.fromhex(self.blob)).decode()
            headers |= {"Repr-Digest": f"sha-256=:{digest}:", "Cache-Control": "immutable, max-age=31536000"}
        return headers

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_content(layout: StorePaths, blob: str) -> BlobContent:
    """Open a complete or partial blob. Raises BadName, FileNotFoundError, or another OSError of the disk."""
    with suppress(FileNotFoundError):
        return _open_whole(layout, blob)
    with suppress(FileNotFoundError, NotADirectoryError):
        return _open_partial(layout, blob)
    return _open_whole(layout, blob)  # it may have just become complete


def _open_whole(layout: StorePaths, blob: str) -> BlobContent:
    if blob.startswith(GIT_PREFIX):
        raise FileNotFoundError(errno.ENOENT, "no complete blob has such a name", blob)
    file = open_blob(layout, blob)
    return BlobContent(blob, file, os.fstat(file.fileno()).st_size, None)


def _open_partial(layout: StorePaths, blob: str) -> BlobContent:
    directory = os.open(layout.partial(blob), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        file = _open_in(directory, "data")
        try:
            ready = _ready(directory)
            status = os.fstat(file.fileno())
            # Discarded and started again meanwhile: the relay bitmap belongs to another file.
            if ready is None or os.stat("data", dir_fd=directory, follow_symlinks=False).st_ino != status.st_ino:
                raise FileNotFoundError(errno.ENOENT, "nothing of it can be relayed", blob)
        except BaseException:
            file.close()
            raise
    finally:
        os.close(directory)
    # Leaves beyond the end of the data do not exist, whatever the relay bitmap says.
    written_leaves = status.st_size // LEAF_BYTES if status.st_size < ready.size_bytes else ready.leaf_count
    return BlobContent(blob, file, ready.size_bytes, from_bitmap(ready.to_bytes()) & leaf_range(0, written_leaves))


def _open_in(directory: int, name: str) -> FileIO:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    file = FileIO(name, opener=lambda path, mode: os.open(path, mode | flags, dir_fd=directory))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "not a regular file", name)
    return file


def _ready(directory: int) -> Bitmap | None:
    with _open_in(directory, "ready") as file:
        return parse_relay_bitmap(file.read(_MAX_READY_BYTES))


class LeafList:
    """The open leaf list of a blob. `digest` is "" for a partial blob, `seal` where there is none."""

    def __init__(self, file: FileIO | None, offset: int, size_bytes: int, digest: str, seal: str = "") -> None:
        self.size_bytes, self.digest, self.seal = size_bytes, digest, seal
        self._file, self._offset = file, offset

    def read(self, start: int, end: int) -> bytes:
        """Return bytes [start, end) of the list; unknown hashes are zeros."""
        data = b""
        if self._file is not None:
            data = os.pread(self._file.fileno(), end - start, self._offset + start)
        return data.ljust(end - start, b"\0")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def open_leaf_list(layout: StorePaths, blob: str) -> LeafList:
    """Open the leaf list of a blob. Raises BadName, FileNotFoundError, or another OSError of the disk.

    Storage keeps lists only of the store's own blobs, not of a library's.
    """
    content = open_content(layout, blob)
    try:
        size_bytes = leaf_list_size(content.size_bytes)
        if content.relayable is not None:
            with suppress(FileNotFoundError, NotADirectoryError):
                return LeafList(FileIO(layout.partial_leaves(blob)), 0, size_bytes, "")
            return LeafList(None, 0, size_bytes, "")
        hashed_ns = os.fstat(content.file.fileno()).st_mtime_ns
    finally:
        content.close()
    file = FileIO(layout.leaf_list(blob))
    status = os.fstat(file.fileno())
    # A list has the mtime of the very blob that was hashed (docs/storage.md).
    if status.st_size != HASH_BYTES + size_bytes or status.st_mtime_ns != hashed_ns:
        file.close()
        raise FileNotFoundError(errno.ENOENT, "the list belongs to another file", blob)
    return LeafList(file, HASH_BYTES, size_bytes, os.pread(file.fileno(), HASH_BYTES, 0).hex(), _seal(layout, blob))


def _seal(layout: StorePaths, blob: str) -> str:
    """Return the seal of a blob's list as a header carries it; "" if there is none."""
    try:
        with layout.seal(blob).open("rb") as f:
            return to_text(decode(f.read(MAX_SEAL_BYTES), LeafListSeal))
    except (FileNotFoundError, BadMessage):
        return ""
