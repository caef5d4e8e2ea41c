"""The hashes of a blob's leaves, in a small file beside it: which leaf is bad, and whether this very file was hashed.

    leaves/<ab>/<sha256>      written durably before its blob gets its name; goes after it

| offset     | bytes | what                                                        |
| ---------- | ----- | ----------------------------------------------------------- |
| 0          | 32    | BLAKE3 of all that follows: a list that does not hash to it says nothing |
| 32         | 32    | BLAKE3 of leaf 0, the first 1 MiB                           |
| 32 + 32 i  | 32    | BLAKE3 of leaf i; the last leaf may be shorter; no padding  |

Sample: the blob of 1,048,577 bytes `w` has two leaves, and its list 96 bytes, beginning `bef8d0e3`. An empty blob has
no leaf, and a list of 32 bytes beginning `af1349b9`, the BLAKE3 of nothing.

The file's mtime is its blob's, to the nanosecond: the blob that has this mtime and the size that fits the list was
hashed whole, and hashed to its name. A blob that was put there by other hands, or changed by a program, has another
one. What a disk changes by itself changes no mtime: only hashing finds that.

Without the file, or with one that is of no use, nothing is lost but the repair by leaf: `verify` writes it anew for a
blob that it finds intact.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container
from contextlib import suppress

from msgspec import structs

from shoal_common.errors import BadName
from shoal_common.layout import Layout
from shoal_common.leaves import HASH_BYTES, leaf_hash, list_bytes, root_of
from shoal_common.messages.records import Manifest
from shoal_common.names import check_blob
from shoal_storage.durable import make_directory, write_file


def write(layout: Layout, sha256: str, hashes: bytes, mtime_ns: int) -> None:
    """Keep the hashes of a blob's leaves, one after the other, durably; `mtime_ns` is the blob's."""
    path = layout.leaves(sha256)
    make_directory(path.parent)
    write_file(path, leaf_hash(hashes) + hashes, mtime_ns)


def read(layout: Layout, sha256: str, size_bytes: int) -> bytes | None:
    """The hashes of a blob's leaves, one after the other; None when there are none, or they cannot be believed."""
    try:
        found = layout.leaves(sha256).read_bytes()
    except OSError:
        return None
    said, hashes = found[:HASH_BYTES], found[HASH_BYTES:]
    return hashes if leaf_hash(hashes) == said and len(found) == _file_bytes(size_bytes) else None


def root(layout: Layout, sha256: str, size_bytes: int) -> str:
    """The root of a blob's leaf list; "" when there is no list, or it cannot be believed."""
    hashes = read(layout, sha256, size_bytes)
    return "" if hashes is None else root_of(hashes)


def with_roots(layout: Layout, manifest: Manifest) -> Manifest:
    """A sealed manifest with the root of every list that is here, and no other: what others say is theirs to say."""
    files = [structs.replace(f, leaves=root(layout, f.sha256, f.size_bytes)) for f in manifest.files]
    return structs.replace(manifest, files=files)


def proves(layout: Layout, sha256: str) -> bool:
    """Whether the file that is this blob now was hashed to its name, here. By stat alone."""
    try:
        blob, leaves = layout.blob(sha256).lstat(), layout.leaves(sha256).lstat()
    except OSError:
        return False
    return (
        stat.S_ISREG(blob.st_mode)
        and leaves.st_size == _file_bytes(blob.st_size)
        and leaves.st_mtime_ns == blob.st_mtime_ns
    )


def follow_time(layout: Layout, sha256: str) -> None:
    """Give the list of a blob that is believed the time that the blob was given."""
    found = layout.blob(sha256).lstat()
    os.utime(layout.leaves(sha256), ns=(found.st_atime_ns, found.st_mtime_ns))


def _file_bytes(size_bytes: int) -> int:
    """Size of the file for a blob of `size_bytes`."""
    return HASH_BYTES + list_bytes(size_bytes)


def remove(layout: Layout, sha256: str) -> None:
    """Remove the hashes of a blob that has gone. Absent already is fine; one that comes back goes at a start."""
    layout.leaves(sha256).unlink(missing_ok=True)


def remove_strays(layout: Layout, blobs: Container[str]) -> None:
    """At start: remove the hashes of all but these blobs, and what a kill left half written. By names alone."""
    for directory in layout.leaf_lists.glob("*/"):
        for path in directory.iterdir():
            if path.name.startswith(".") and path.suffix == ".new":
                path.unlink(missing_ok=True)
                continue
            with suppress(BadName):  # not ours; left alone
                if check_blob(path.name)[:2] == directory.name and path.name not in blobs:
                    path.unlink(missing_ok=True)
