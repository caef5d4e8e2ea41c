"""The leaf hash file: the hashes of a blob's leaves, kept beside it. It locates corrupt leaves and marks the blob as
verified.

    leaves/<ab>/<sha256>      written durably before its blob gets its name; deleted after it

| offset     | bytes | what                                                        |
| ---------- | ----- | ----------------------------------------------------------- |
| 0          | 32    | BLAKE3 of all that follows: a list that does not match it is ignored |
| 32         | 32    | BLAKE3 of leaf 0, the first 1 MiB                           |
| 32 + 32 i  | 32    | BLAKE3 of leaf i; the last leaf may be shorter; no padding  |

Sample: the blob of 1,048,577 bytes `w` has two leaves, and its list 96 bytes, beginning `bef8d0e3`. An empty blob has
no leaf, and a list of 32 bytes beginning `af1349b9`, the BLAKE3 of nothing.

The file's mtime is its blob's, to the nanosecond. A blob with this mtime and a size that fits the list was hashed
whole and matched its name. A blob that somebody copied here, or that a program changed, has another mtime. What a
disk changes by itself changes no mtime: only hashing finds that.

Without a usable file only the repair by leaf is lost: `verify` writes a new one for a blob that it finds intact.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container
from contextlib import suppress

from msgspec import structs

from shoal_common.errors import BadName
from shoal_common.messages.manifest import Manifest
from shoal_common.names import check_blob
from shoal_common.store.leaf_hash import HASH_BYTES, hash_leaf_list, leaf_hash, leaf_list_size
from shoal_common.store.store_paths import StorePaths
from shoal_storage.files.atomic_file import make_directory, replace_file


def write(layout: StorePaths, sha256: str, hashes: bytes, mtime_ns: int) -> None:
    """Store the concatenated hashes of a blob's leaves, durably; `mtime_ns` is the blob's."""
    path = layout.leaf_list(sha256)
    make_directory(path.parent)
    replace_file(path, leaf_hash(hashes) + hashes, mtime_ns)


def read(layout: StorePaths, sha256: str, size_bytes: int) -> bytes | None:
    """Return the concatenated hashes of a blob's leaves; None when there is no valid list."""
    try:
        content = layout.leaf_list(sha256).read_bytes()
    except OSError:
        return None
    checksum, hashes = content[:HASH_BYTES], content[HASH_BYTES:]
    return hashes if leaf_hash(hashes) == checksum and len(content) == _file_bytes(size_bytes) else None


def read_leaf_list_digest(layout: StorePaths, sha256: str, size_bytes: int) -> str:
    """Return the digest of a blob's leaf list; "" when there is no valid list."""
    hashes = read(layout, sha256, size_bytes)
    return "" if hashes is None else hash_leaf_list(hashes)


def with_leaf_list_digests(layout: StorePaths, manifest: Manifest) -> Manifest:
    """Return a sealed manifest with the digest of every list that is here, and no digests from elsewhere."""
    files = [
        structs.replace(f, leaf_list_digest=read_leaf_list_digest(layout, f.sha256, f.size_bytes))
        for f in manifest.files
    ]
    return structs.replace(manifest, files=files)


def is_verified(layout: StorePaths, sha256: str) -> bool:
    """Whether the blob's current file was hashed to its name on this node. By stat alone."""
    try:
        blob, leaves = layout.blob(sha256).lstat(), layout.leaf_list(sha256).lstat()
    except OSError:
        return False
    return (
        stat.S_ISREG(blob.st_mode)
        and leaves.st_size == _file_bytes(blob.st_size)
        and leaves.st_mtime_ns == blob.st_mtime_ns
    )


def copy_mtime(layout: StorePaths, sha256: str) -> None:
    """Give the list of a trusted blob the blob's mtime."""
    blob_stat = layout.blob(sha256).lstat()
    os.utime(layout.leaf_list(sha256), ns=(blob_stat.st_atime_ns, blob_stat.st_mtime_ns))


def _file_bytes(size_bytes: int) -> int:
    """Return the size of the leaf hash file of a blob of `size_bytes`."""
    return HASH_BYTES + leaf_list_size(size_bytes)


def delete(layout: StorePaths, sha256: str) -> None:
    """Delete the leaf hashes of a deleted blob, and their seal. Absent is fine; a start deletes what comes back."""
    layout.leaf_list(sha256).unlink(missing_ok=True)
    layout.seal(sha256).unlink(missing_ok=True)


def delete_orphans(layout: StorePaths, blobs: Container[str]) -> None:
    """At start: delete the leaf hashes of all other blobs, and half-written files. By names alone."""
    for directory in layout.leaf_lists.glob("*/"):
        for path in directory.iterdir():
            if path.name.startswith(".") and path.suffix == ".new":
                path.unlink(missing_ok=True)
                continue
            with suppress(BadName):  # a foreign file; left alone
                sha256 = path.name.removesuffix(".seal")
                if check_blob(sha256)[:2] == directory.name and sha256 not in blobs:
                    path.unlink(missing_ok=True)
