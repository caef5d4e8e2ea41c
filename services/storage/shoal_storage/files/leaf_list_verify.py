"""Verification of a partial blob by its leaf list instead of by sha256 (docs/transfer.md). Blocking.

    partial/<blob>/leaves      the list, written by the fetcher; trusted when its digest is a sealed one

A list with a sealed digest is as good as the blob's name: some node hashed exactly these leaves to it. A list with
another digest is ignored, and the blob is hashed by sha256, as without a digest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from shoal_common.errors import Corrupt
from shoal_common.logs import StructuredLogger
from shoal_common.store.bitmap import Bitmap
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_list_size
from shoal_common.store.store_paths import StorePaths
from shoal_storage.files.atomic_file import replace_file
from shoal_storage.files.hashing import FileHashes, mismatching_leaves

log = StructuredLogger("listed")


class CorruptLeaves(Corrupt):
    """Some leaves do not match the sealed list; only these are fetched again."""

    def __init__(self, blob: str, leaves: list[int]) -> None:
        super().__init__(
            f"{len(leaves)} leaves of {blob[:16]}… do not match their hashes on disk; they are fetched again",
            bad_leaves=len(leaves),
        )
        self.leaves = leaves


def read_sealed_list(layout: StorePaths, blob: str, size_bytes: int, leaf_list_digest: str) -> bytes | None:
    """Return the partial blob's own list if it has the given digest; None if there is none or it differs."""
    if not leaf_list_digest or blob.startswith("git-"):  # the list covers neither git's sha1 nor an unknown sha256
        return None
    try:
        hashes = layout.partial_leaves(blob).read_bytes()
    except FileNotFoundError:
        hashes = b""
    if len(hashes) == leaf_list_size(size_bytes) and hash_leaf_list(hashes) == leaf_list_digest:
        return hashes
    log.warning("leaf list of a partial blob does not match the sealed digest; hashing by sha256", blob=blob)
    return None


def verify_leaves(
    data: Path, blob: str, size_bytes: int, hashes: bytes, on_progress: Callable[[], None]
) -> FileHashes:
    """Hash a partial blob leaf by leaf against a sealed list. Raises CorruptLeaves, or Corrupt for a wrong size."""
    with FileIO(data) as f:
        file_stat = os.fstat(f.fileno())
        if file_stat.st_size > size_bytes:
            raise Corrupt(
                f"received {file_stat.st_size} bytes for {blob[:16]}… instead of {size_bytes}; they are discarded "
                "and fetched again",
                expected=blob,
            )
        bad = mismatching_leaves(f, hashes, on_progress)
    if bad:
        raise CorruptLeaves(blob, bad)
    return FileHashes(
        sha256=blob,
        git_sha1="",
        size_bytes=size_bytes,
        leaf_hashes=hashes,
        mtime_ns=file_stat.st_mtime_ns,
        by_leaf_list=True,
    )


def clear_leaves(layout: StorePaths, blob: str, size_bytes: int, leaves: list[int]) -> None:
    """Mark leaves of a partial blob as missing, durably. The others stay."""
    layout.relay_bitmap(blob).unlink(missing_ok=True)  # the fetcher makes a new one
    have = layout.partial(blob) / "have"
    have_leaves = Bitmap(size_bytes, have.read_bytes() if have.exists() else b"")
    kept = Bitmap(size_bytes)
    for leaf in set(range(have_leaves.leaf_count)) - set(leaves):
        if leaf in have_leaves:
            kept.add(leaf)
    replace_file(have, kept.to_bytes())
