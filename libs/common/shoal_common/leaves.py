"""The hash of a leaf, a blob's list of them, and the list's root (docs/transfer.md)."""

from __future__ import annotations

from blake3 import blake3

from shoal_common.layout import leaf_count

HASH_BYTES = 32


def leaf_hash(leaf: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3 of a leaf, 32 bytes."""
    return blake3(leaf).digest()


def root_of(hashes: bytes) -> str:
    """The root of a leaf list, as 64 hex digits: the BLAKE3 of all its hashes, one after the other."""
    return blake3(hashes).hexdigest()


def list_bytes(size_bytes: int) -> int:
    """Size of the leaf list of a blob of `size_bytes`, without its root."""
    return HASH_BYTES * leaf_count(size_bytes)
