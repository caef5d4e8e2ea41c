"""Leaf hashes, a blob's leaf list, and the list's digest (docs/transfer.md)."""

from __future__ import annotations

from blake3 import blake3

from shoal_common.store.bitmap import leaf_count

HASH_BYTES = 32


def leaf_hash(leaf: bytes | bytearray | memoryview) -> bytes:
    """Return the BLAKE3 of a leaf, 32 bytes."""
    return blake3(leaf).digest()


def hash_leaf_list(hashes: bytes) -> str:
    """Return a leaf list's digest as 64 hex digits: the BLAKE3 of all its hashes, concatenated."""
    return blake3(hashes).hexdigest()


def leaf_list_size(size_bytes: int) -> int:
    """Return the size of the leaf list of a blob of `size_bytes`."""
    return HASH_BYTES * leaf_count(size_bytes)
