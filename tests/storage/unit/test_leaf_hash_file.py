"""Leaf hash files beside blobs: their content, what they prove, and when they are deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import leaf_hash
from shoal_common.store.store_paths import StorePaths
from shoal_storage.files import leaf_hash_file
from shoal_storage.integrity import blob_check, quarantine
from tests.storage.store_fixtures import Model, StoreFixture, files_below, files_of, sha256

LAST_BYTES = 777
WEIGHTS = bytes(range(256)) * (LEAF_BYTES // 256) + b"x" * LEAF_BYTES + b"z" * LAST_BYTES
LARGE = Model("org/large", {"weights.bin": WEIGHTS, "config.json": b"{}", "empty": b""})
BLOB = sha256(WEIGHTS)


def no_rate_limit(_: int) -> None:
    """No rate limit."""


def test_a_commit_writes_the_leaf_hashes_beside_the_blob(root: Path) -> None:
    store = StoreFixture(root)
    store.bring_in(LARGE)
    for data in LARGE.bytes.values():
        name = sha256(data)
        hashes = b"".join(blake3(data[at : at + LEAF_BYTES]).digest() for at in range(0, len(data), LEAF_BYTES))
        assert store.layout.leaf_list(name).read_bytes() == blake3(hashes).digest() + hashes
        assert leaf_hash_file.read(store.layout, name, len(data)) == hashes
        assert leaf_hash_file.is_verified(store.layout, name)


def test_the_sample_of_the_format_is_true() -> None:
    two = leaf_hash(b"w" * LEAF_BYTES) + leaf_hash(b"w")
    assert leaf_hash(two).hex()[:8] in (leaf_hash_file.__doc__ or "")
    assert leaf_hash(b"").hex()[:8] in (leaf_hash_file.__doc__ or "")


@pytest.mark.parametrize(
    "change", ["another file", "another time", "another size", "no leaves", "leaves cut", "gone"]
)
def test_leaf_hashes_do_not_verify_a_changed_file(root: Path, change: str) -> None:
    store = StoreFixture(root)
    store.bring_in(LARGE)
    blob, listed = store.layout.blob(BLOB), store.layout.leaf_list(BLOB)
    assert leaf_hash_file.is_verified(store.layout, BLOB)
    if change == "another file":
        blob.unlink()
        blob.write_bytes(WEIGHTS)
    elif change == "another time":
        os.utime(blob, ns=(blob.stat().st_atime_ns, blob.stat().st_mtime_ns + 1))
    elif change == "another size":
        before = blob.stat()
        os.truncate(blob, LEAF_BYTES)
        os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "no leaves":
        listed.unlink()
    elif change == "leaves cut":
        os.truncate(listed, 64)
        os.utime(listed, ns=(0, blob.stat().st_mtime_ns))
    else:
        blob.unlink()
    assert not leaf_hash_file.is_verified(store.layout, BLOB)
    blob.unlink(missing_ok=True)
    blob.write_bytes(WEIGHTS)


def test_a_damaged_leaf_list_is_not_read(root: Path) -> None:
    store = StoreFixture(root)
    store.bring_in(LARGE)
    path = store.layout.leaf_list(BLOB)
    whole = path.read_bytes()
    for at in (0, 31, 32, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert leaf_hash_file.read(store.layout, BLOB, len(WEIGHTS)) is None
    path.write_bytes(whole)
    assert leaf_hash_file.read(store.layout, BLOB, len(WEIGHTS) + LEAF_BYTES) is None, "of a blob of another size"


@pytest.mark.parametrize("damage", ["gone", "damaged", "of another time"])
def test_an_intact_blob_without_valid_leaf_hashes_gets_them(root: Path, damage: str) -> None:
    store = StoreFixture(root)
    store.bring_in(LARGE)
    path = store.layout.leaf_list(BLOB)
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(b"\0" * len(whole))
    else:
        os.utime(path, ns=(0, 0))
    checked = blob_check.hash_blob(store.disk, BLOB, no_rate_limit)
    assert checked is not None and checked.intact and not checked.has_leaf_hash_file
    quarantine.write_leaf_hashes(store.disk, checked)
    assert path.read_bytes() == whole and leaf_hash_file.is_verified(store.layout, BLOB)
    again = blob_check.hash_blob(store.disk, BLOB, no_rate_limit)
    assert again is not None and again.has_leaf_hash_file


def test_leaf_hashes_are_not_written_for_a_replaced_file(root: Path) -> None:
    store = StoreFixture(root)
    store.bring_in(LARGE)
    store.layout.leaf_list(BLOB).unlink()
    checked = blob_check.hash_blob(store.disk, BLOB, no_rate_limit)
    assert checked is not None
    blob = store.layout.blob(BLOB)
    blob.rename(root.parent / "kept")  # so that the new file cannot get the same inode
    quarantine.write_leaf_hashes(store.disk, checked)
    blob.write_bytes(WEIGHTS)
    quarantine.write_leaf_hashes(store.disk, checked)
    assert not store.layout.leaf_list(BLOB).exists()


def test_leaf_hashes_go_with_their_blob_and_orphans_at_a_start(root: Path) -> None:
    store = StoreFixture(root)
    other = Model("org/other", {"other.bin": b"o" * 3000})
    store.bring_in(LARGE)
    store.bring_in(other)
    store.delete(LARGE)
    assert files_below(root) == files_of(other)
    stray = store.layout.leaf_list(BLOB)
    unfinished = store.layout.leaf_list(sha256(other.bytes["other.bin"])).with_name(f".{BLOB}.new")
    strange = store.layout.leaf_lists / "notes.txt"
    for path in (stray, unfinished, strange):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"?")
    del store
    again = StoreFixture(root)
    assert again.holds(other)
    assert files_below(root) == files_of(other) | {str(strange.relative_to(root))}


def test_a_blobs_leaf_hashes_have_one_path() -> None:
    assert StorePaths(Path("/s")).leaf_list("ab" * 32) == Path("/s/leaves/ab") / ("ab" * 32)
