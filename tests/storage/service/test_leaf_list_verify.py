"""A blob that arrived with a sealed leaf list is verified by it: as certain as by sha256, without computing one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal_common.errors import Corrupt
from shoal_common.messages import decode, encode
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import GetManifest
from shoal_common.store.bitmap import LEAF_BYTES, Bitmap
from shoal_common.store.leaf_hash import hash_leaf_list
from shoal_storage.files import leaf_hash_file, leaf_list_verify
from shoal_storage.files.hashing import FileHashes, mismatching_leaves
from shoal_storage.store import partials
from shoal_storage.store.commit import commit_blob
from shoal_storage.store.partials import verify_partial
from tests.harness.nats import NatsServer
from tests.storage.running_storage import on_node
from tests.storage.store_fixtures import Model, StoreFixture, leaf_list, put, sha256

WEIGHTS = os.urandom(5 * LEAF_BYTES + 77)
LARGE = Model("org/large", {"weights.bin": WEIGHTS, "config.json": b"{}"})
BLOB, LIST = sha256(WEIGHTS), leaf_list(WEIGHTS)
ROOT = hash_leaf_list(LIST)


def arrived(store: StoreFixture, data: bytes = WEIGHTS, hashes: bytes = LIST) -> None:
    """All bytes are present, with the list beside them."""
    store.reserve(LARGE)
    put(store.layout, BLOB, data)
    store.layout.partial_leaves(BLOB).write_bytes(hashes)
    store.layout.relay_bitmap(BLOB).write_bytes(b"of this boot")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def never(*_: object) -> FileHashes:
    raise AssertionError("hashed by sha256")


def test_I1_a_commit_by_leaf_digest_reads_every_leaf_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreFixture(root)
    arrived(store)
    monkeypatch.setattr(partials, "hash_file", never)
    commit_blob(store.disk, BLOB, verify_partial(store.disk, BLOB, len(WEIGHTS), ROOT))
    assert store.layout.blob(BLOB).read_bytes() == WEIGHTS
    assert leaf_hash_file.read(store.layout, BLOB, len(WEIGHTS)) == LIST and leaf_hash_file.is_verified(
        store.layout, BLOB
    )
    assert not store.layout.partial(BLOB).exists()


@pytest.mark.parametrize("at", [0, 3 * LEAF_BYTES - 1, len(WEIGHTS) - 1])
def test_I1_a_leaf_that_differs_from_the_list_costs_only_itself(root: Path, at: int) -> None:
    store = StoreFixture(root)
    arrived(store, flipped(WEIGHTS, at))
    with pytest.raises(leaf_list_verify.CorruptLeaves) as refused:
        verify_partial(store.disk, BLOB, len(WEIGHTS), ROOT)
    assert refused.value.leaves == [at // LEAF_BYTES] and refused.value.details == {"bad_leaves": 1}
    leaf_list_verify.clear_leaves(store.layout, BLOB, len(WEIGHTS), refused.value.leaves)
    have = Bitmap(len(WEIGHTS), (store.layout.partial(BLOB) / "have").read_bytes())
    assert [leaf for leaf in range(6) if leaf not in have] == [at // LEAF_BYTES]
    assert not store.layout.relay_bitmap(BLOB).exists(), "the fetcher begins it again"


def test_I1_a_file_of_another_size_is_not_the_blob(root: Path) -> None:
    store = StoreFixture(root)
    arrived(store, WEIGHTS + b"x")
    with pytest.raises(Corrupt, match="instead of"):
        verify_partial(store.disk, BLOB, len(WEIGHTS), ROOT)
    (store.layout.partial(BLOB) / "data").write_bytes(WEIGHTS[: 5 * LEAF_BYTES])
    with pytest.raises(leaf_list_verify.CorruptLeaves) as refused:
        verify_partial(store.disk, BLOB, len(WEIGHTS), ROOT)
    assert refused.value.leaves == [5]


@pytest.mark.parametrize("hashes", [b"", LIST[:-32], LIST + bytes(32), flipped(LIST, 40)])
def test_I1_a_list_that_is_not_the_sealed_one_is_not_trusted(root: Path, hashes: bytes) -> None:
    store = StoreFixture(root)
    arrived(store, WEIGHTS, hashes)
    assert verify_partial(store.disk, BLOB, len(WEIGHTS), ROOT).leaf_hashes == LIST
    store.layout.partial_leaves(BLOB).unlink()
    assert verify_partial(store.disk, BLOB, len(WEIGHTS), ROOT).sha256 == BLOB
    # Wrong bytes with their own list, and the digest of the right one.
    wrong = flipped(WEIGHTS, 99)
    put(store.layout, BLOB, wrong)
    store.layout.partial_leaves(BLOB).write_bytes(leaf_list(wrong))
    with pytest.raises(Corrupt, match="hash to"):
        verify_partial(store.disk, BLOB, len(WEIGHTS), ROOT)


def test_every_leaf_is_checked_and_a_stop_ends_it(tmp_path: Path) -> None:
    path, polls = tmp_path / "data", []
    path.write_bytes(WEIGHTS)
    with path.open("rb", buffering=0) as f:
        assert mismatching_leaves(f, LIST, lambda: polls.append(1)) == [] and len(polls) == 6
        assert mismatching_leaves(f, bytes(len(LIST)), lambda: None) == list(range(6))

        def stop() -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            mismatching_leaves(f, LIST, stop)


async def test_a_service_commits_by_leaf_digest_and_drops_bad_leaves(
    nats: NatsServer, fresh: Callable[[str], str], tmp_path: Path
) -> None:
    async with on_node(nats, tmp_path, fresh("node")) as node, node.storage():
        assert set((await node.reserve(LARGE.manifest)).missing) == set(LARGE.blobs)
        put(node.layout, BLOB, flipped(WEIGHTS, 2 * LEAF_BYTES))
        node.layout.partial_leaves(BLOB).write_bytes(LIST)
        with pytest.raises(Corrupt, match="1 leaves of"):
            await node.commit(BLOB, ROOT)
        have = Bitmap(len(WEIGHTS), (node.layout.partial(BLOB) / "have").read_bytes())
        assert have.missing_ranges() == [(2 * LEAF_BYTES, 3 * LEAF_BYTES)]
        put(node.layout, BLOB, WEIGHTS)
        assert (await node.commit(BLOB, ROOT)).leaf_list_digest == ROOT
        assert (await node.commit(BLOB)).leaf_list_digest == ROOT, "asked again"
        small = sha256(b"{}")
        put(node.layout, small, b"{}")
        assert (await node.commit(small)).leaf_list_digest == hash_leaf_list(leaf_list(b"{}"))
        await node.seal(LARGE.sealed)
        path = node.layout.manifest(LARGE.manifest.model)
        assert decode(path.read_bytes(), Manifest) == LARGE.kept
    # A model sealed before leaf list digests existed is published with them, and its manifest stays as it is.
    path.write_bytes(encode(LARGE.sealed))
    async with on_node(nats, tmp_path / "again", node.node) as again:
        again.home.rmdir() if not any(again.home.iterdir()) else None
        node.here = again.here
        async with node.storage():
            assert await again.ask("manifest", GetManifest(model=LARGE.name), Manifest) == LARGE.kept
            assert decode(path.read_bytes(), Manifest) == LARGE.sealed
