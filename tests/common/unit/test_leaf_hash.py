"""Leaf hashes, leaf lists and their digests."""

from blake3 import blake3

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import HASH_BYTES, hash_leaf_list, leaf_hash, leaf_list_size


def test_a_leaf_list_has_32_bytes_a_leaf_and_none_if_empty() -> None:
    assert [leaf_list_size(n) for n in (0, 1, LEAF_BYTES, LEAF_BYTES + 1)] == [0, 32, 32, 64]
    assert len(leaf_hash(b"w")) == HASH_BYTES


def test_a_leaf_digest_changes_with_any_leaf() -> None:
    hashes = leaf_hash(b"a") + leaf_hash(b"b")
    assert hash_leaf_list(hashes) == blake3(hashes).hexdigest()
    assert hash_leaf_list(leaf_hash(b"b") + leaf_hash(b"a")) != hash_leaf_list(hashes)
