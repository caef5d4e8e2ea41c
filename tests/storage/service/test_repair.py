"""A corrupt blob repaired by leaf: exactly the bad leaves are found and downloaded again."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_common.errors import Corrupt, QuotaExceeded
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.settings.node import StorageSettings
from shoal_common.store.bitmap import LEAF_BYTES, leaf_count
from shoal_common.store.leaf_hash import leaf_hash
from shoal_storage.admission.admission import admit
from shoal_storage.files import leaf_hash_file
from shoal_storage.integrity import blob_check, quarantine
from shoal_storage.integrity.repair import create_partial, record_good_leaves, repairable_blobs
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import manifests_with_blob
from shoal_storage.store.commit import delete_quarantined
from shoal_storage.store.partials import delete_partial, verify_partial, write_partial
from tests.harness.fresh import Fresh
from tests.harness.nats import NatsServer
from tests.storage.running_storage import on_node
from tests.storage.service.test_verifier import flip, verify
from tests.storage.store_fixtures import (
    Model,
    StoreFixture,
    check_invariants,
    claimed_leaves,
    files_below,
    files_of,
    put,
    put_missing,
)
from tests.storage.syscall_tracer import Call, seen
from tests.storage.unit.test_leaf_hash_file import no_rate_limit

EXAMPLES = 60


def model_of(size_bytes: int) -> Model:
    """A model with one blob of so many bytes, no two of its leaves alike."""
    blob = b"".join(leaf.to_bytes(4, "big") * (LEAF_BYTES // 4) for leaf in range(leaf_count(size_bytes)))
    return Model("org/large", {"weights.bin": blob[:size_bytes]})


def only_blob(model: Model) -> tuple[str, bytes]:
    """Its name and its bytes."""
    ((name, data),) = model.blobs.items()
    return name, data


def verify_changed_blob(store: StoreFixture, blob: str) -> blob_check.VerificationResult:
    """Do what the verifier does with a corrupt blob."""
    checked = blob_check.hash_blob(store.disk, blob, no_rate_limit)
    assert checked is not None and not checked.intact
    assert quarantine.quarantine_blob(store.disk, checked, manifests_with_blob(blob, store.ledger))
    store.ledger.quarantine(blob)
    record_good_leaves(store.disk, checked)
    return checked


@contextmanager
def corrupted_store(
    size_bytes: int, offsets: set[int]
) -> Iterator[tuple[StoreFixture, Model, blob_check.VerificationResult]]:
    """A store with a model whose blob was changed at these offsets and quarantined."""
    with tempfile.TemporaryDirectory() as name:
        store, model = StoreFixture(Path(name) / "store"), model_of(size_bytes)
        blob, _ = only_blob(model)
        store.bring_in(model)
        for offset in offsets:
            flip(store.layout.blob(blob), offset)
        yield store, model, verify_changed_blob(store, blob)
        check_invariants(store.root, blob if blob not in store.ledger.blobs else "")


sizes = st.sampled_from([1, LEAF_BYTES - 1, LEAF_BYTES, LEAF_BYTES + 1, 3 * LEAF_BYTES, 3 * LEAF_BYTES + 777])


@settings(max_examples=EXAMPLES, deadline=None)
@given(sizes, st.data())
def test_I1_exactly_the_leaves_with_a_flipped_byte_are_refetched(size_bytes: int, data: st.DataObject) -> None:
    at = st.sampled_from([0, size_bytes - 1]) | st.integers(0, size_bytes - 1)
    offsets = data.draw(st.sets(at, min_size=1, max_size=3))
    bad = {offset // LEAF_BYTES for offset in offsets}
    with corrupted_store(size_bytes, offsets) as (store, model, checked):
        blob, whole = only_blob(model)
        assert checked.bad_leaf_count == len(bad)
        assert store.reserve(model) == [blob]
        every = set(range(leaf_count(size_bytes)))
        # Nothing is reused of a blob without a good leaf.
        assert claimed_leaves(store.layout.partial(blob), whole) == every - bad
        assert put_missing(store.layout, blob, whole) == bad
        assert store.commit(blob) == blob
        store.seal(model)
        assert store.holds(model) and leaf_hash_file.is_verified(store.layout, blob)
        assert files_below(store.root) == files_of(model)


def test_I1_an_unreadable_leaf_is_corrupt_and_others_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = StoreFixture(root), model_of(4 * LEAF_BYTES)
    blob, whole = only_blob(model)
    store.bring_in(model)
    real = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        if offset in (LEAF_BYTES, 3 * LEAF_BYTES):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, count, offset)

    with monkeypatch.context() as failing:
        failing.setattr(os, "pread", pread)
        checked = verify_changed_blob(store, blob)
    assert checked.bad_leaf_count == 2
    store.reserve(model)
    assert put_missing(store.layout, blob, whole) == {1, 3}
    store.commit(blob)
    store.seal(model)
    assert store.holds(model)


def test_a_dead_device_is_not_read_leaf_by_leaf(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = StoreFixture(root), model_of(5 * LEAF_BYTES)
    blob, whole = only_blob(model)
    store.bring_in(model)
    asked = []

    def pread(fd: int, count: int, offset: int) -> bytes:
        asked.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as failing:
        failing.setattr(os, "pread", pread)
        failing.setattr(blob_check, "_MAX_UNREADABLE_LEAVES", 2)
        checked = verify_changed_blob(store, blob)
    assert asked == [0, LEAF_BYTES, 2 * LEAF_BYTES]
    assert checked.bad_leaf_count == 5
    store.reserve(model)
    assert put_missing(store.layout, blob, whole) == set(range(5))
    store.commit(blob)
    store.seal(model)


@pytest.mark.parametrize("useless", ["gone", "damaged", "of other bytes"])
def test_without_trusted_leaf_hashes_everything_is_refetched(root: Path, useless: str) -> None:
    store, model = StoreFixture(root), model_of(3 * LEAF_BYTES)
    blob, whole = only_blob(model)
    store.bring_in(model)
    path = store.layout.leaf_list(blob)
    if useless == "gone":
        path.unlink()
    elif useless == "damaged":
        path.write_bytes(b"\0" * path.stat().st_size)
    else:
        leaf_hash_file.write(store.layout, blob, leaf_hash(b"?") * 3, 0)
    flip(store.layout.blob(blob), 5)
    checked = verify_changed_blob(store, blob)
    assert checked.bad_leaf_count == 3 and not store.layout.quarantined_have(blob).exists()
    store.reserve(model)
    assert put_missing(store.layout, blob, whole) == {0, 1, 2}
    store.commit(blob)
    store.seal(model)
    assert files_below(root) == files_of(model)


def test_a_repair_that_does_not_make_the_blob_is_discarded(root: Path) -> None:
    store, model = StoreFixture(root), model_of(3 * LEAF_BYTES)
    blob, whole = only_blob(model)
    store.bring_in(model)
    flip(store.layout.blob(blob), LEAF_BYTES + 1)
    # A list made of the changed byte, with a valid self-check: it calls the bad leaf good.
    now = store.layout.blob(blob).read_bytes()
    lie = [leaf_hash(now[at : at + LEAF_BYTES]) for at in range(0, len(now), LEAF_BYTES)]
    lie[2] = leaf_hash(b"?")
    leaf_hash_file.write(store.layout, blob, b"".join(lie), store.layout.blob(blob).stat().st_mtime_ns)
    assert verify_changed_blob(store, blob).bad_leaf_count == 1
    partial = store.ledger.arrivals.partials
    create_partial(store.disk, blob, len(whole), [model.name])
    directory = store.layout.partial(blob)
    with (directory / "data").open("r+b") as f:
        f.seek(2 * LEAF_BYTES)
        f.write(whole[2 * LEAF_BYTES :])
    with pytest.raises(Corrupt):
        verify_partial(store.disk, blob, len(whole))
    # What the service does then.
    delete_partial(store.disk, blob)
    write_partial(store.disk, blob, len(whole), [model.name])
    assert not partial and claimed_leaves(directory, whole) == set()
    store.reserve(model)
    assert put_missing(store.layout, blob, whole) == {0, 1, 2}
    store.commit(blob)
    store.seal(model)
    assert store.holds(model) and files_below(root) == files_of(model)


def test_an_old_bitmap_does_not_count_for_a_newly_corrupt_blob(root: Path) -> None:
    store, model = StoreFixture(root), model_of(3 * LEAF_BYTES)
    blob, whole = only_blob(model)
    store.bring_in(model)
    store.layout.quarantined_have(blob).write_bytes(b"\x03")
    store.layout.leaf_list(blob).unlink()
    flip(store.layout.blob(blob), 0)
    verify_changed_blob(store, blob)
    assert not store.layout.quarantined_have(blob).exists()
    store.reserve(model)
    assert put_missing(store.layout, blob, whole) == {0, 1, 2}
    store.commit(blob)
    store.seal(model)


def test_claims_of_a_partial_without_data_are_dropped(root: Path) -> None:
    store, model = StoreFixture(root), model_of(3 * LEAF_BYTES)
    blob, whole = only_blob(model)
    store.reserve(model)
    put(store.layout, blob, whole)
    (store.layout.partial(blob) / "data").unlink()  # by hand, while storage runs
    store.reserve(model)
    assert not (store.layout.partial(blob) / "have").exists()
    assert put_missing(store.layout, blob, whole) == {0, 1, 2}
    store.commit(blob)
    store.seal(model)


def test_I6_a_repair_killed_at_any_change_claims_no_bad_leaf(
    tmp_path: Path,
) -> None:
    model, bad = model_of(2 * LEAF_BYTES + 500), {0, 2}
    blob, whole = only_blob(model)

    class Killed(BaseException):
        """Nothing in the store expects this error: the disk is left as a kill would leave it."""

    def repair(root: Path, last: int) -> list[Call]:
        """Corrupt, verify and repair, up to a change."""

        def before(call: Call) -> bool:
            if call.number == last:
                raise Killed
            return True

        store = StoreFixture(root)
        store.bring_in(model)
        for leaf in bad:
            flip(store.layout.blob(blob), leaf * LEAF_BYTES + 9)
        with seen(root, before) as seam:
            verify_changed_blob(store, blob)
            store.reserve(model)
            assert put_missing(store.layout, blob, whole) == bad
            store.commit(blob)
            store.seal(model)
        return seam.calls

    changes = repair(tmp_path / "whole", last=0)
    assert len(changes) > 30
    fetched_whole = []
    for change in changes:
        root = tmp_path / f"{change.number}"
        with pytest.raises(Killed):
            repair(root, change.number)
        store = StoreFixture(root)
        claimed_leaves(store.layout.partial(blob), whole)
        if blob in store.ledger.blobs and not blob_check.hash_blob(store.disk, blob, no_rate_limit).intact:  # type: ignore[union-attr]  # it is there
            verify_changed_blob(store, blob)
        if store.reserve(model):
            came = put_missing(store.layout, blob, whole)
            assert bad <= came or not came
            if came == {0, 1, 2}:
                fetched_whole.append(change)
            store.commit(blob)
        store.seal(model)
        assert store.holds(model)
        del store
        again = StoreFixture(root)
        assert again.holds(model) and files_below(root) == files_of(model)
        del again
    # Between the rename into quarantine and that of the bitmap, nothing tells which leaves are good.
    assert all("quarantine.py:quarantine_blob" in c.site or "record_good_leaves" in c.site for c in fetched_whole)
    assert fetched_whole


def test_a_start_knows_what_is_repairable_and_drops_bitmaps(root: Path) -> None:
    store, model = StoreFixture(root), model_of(3 * LEAF_BYTES)
    blob, whole = only_blob(model)
    store.bring_in(model)
    flip(store.layout.blob(blob), 0)
    verify_changed_blob(store, blob)
    lonely = store.layout.quarantined_have("cd" * 32)
    lonely.write_bytes(b"\x01")
    del store
    again = StoreFixture(root)
    assert again.ledger.quarantined == {blob} and not lonely.exists()
    assert repairable_blobs(again.disk, again.ledger.quarantined) == {blob: len(whole)}
    delete_quarantined(again.disk, blob)
    assert files_below(root) == files_of(model) - {
        str(p.relative_to(root))
        for f in model.sealed.files
        for p in (again.layout.blob(blob), again.layout.leaf_list(blob), again.layout.view_file(model.sealed, f.path))
    }
    again.bring_in(model)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_I3_a_repair_needs_disk_space_only_for_missing_leaves(
    size_bytes: int, there_bytes: int, free_bytes: int
) -> None:
    blob = "ab" * 32
    file = ManifestFile(path="weights.bin", size_bytes=size_bytes, sha256=blob)
    manifest = Manifest(repo="org/m", commit="0" * 40, files=[file])
    ledger = Ledger()
    ledger.quarantine(blob)
    ledger.set_repairable({blob: min(there_bytes, size_bytes)})

    def approved(quota_bytes: int | None) -> bool:
        try:
            admit(manifest, ledger, StorageSettings(quota_bytes=quota_bytes, headroom_bytes=0), free_bytes)
        except QuotaExceeded:
            return False
        return True

    assert approved(None) == (free_bytes >= size_bytes - min(there_bytes, size_bytes))
    assert not approved(size_bytes - 1)


async def test_verify_reports_bad_leaves_and_already_incomplete_models(
    nats: NatsServer, fresh: Fresh, tmp_path: Path
) -> None:
    model, other = model_of(3 * LEAF_BYTES + 1), Model("org/other", {"other.bin": b"o" * 300})
    blob, whole = only_blob(model)
    async with on_node(nats, tmp_path, fresh("storage")) as node:
        async with node.storage() as process:
            await node.bring_in(model)
            await node.bring_in(other)
            for offset in (0, 1, 3 * LEAF_BYTES):
                flip(node.layout.blob(blob), offset)
            result = (await verify(node)).result
            assert (result["corrupt"], result["bad_leaves"]) == ([blob], 2)
            assert (result["models"], result["incomplete"]) == ([model.name], [model.name])
            again = (await verify(node)).result
            assert (again["models"], again["bad_leaves"], again["incomplete"]) == ([], 0, [model.name])
            assert (await verify(node, "org/other")).result["incomplete"] == [], "it was not asked about"
            await process.kill()
        async with node.storage():
            assert (await node.storage_state()).quarantined == [blob]
            assert (await node.reserve(model.manifest)).missing == [blob]
            state = await node.storage_state()
            assert (state.quarantined, state.reserved_bytes) == ([], len(whole))
            assert put_missing(node.layout, blob, whole) == {0, 3}
            await node.commit(blob)
            ready = await node.seal(model.sealed)
            assert ready.revisions == ["main"]
            assert files_below(node.layout.root) == files_of(model, other)
            # A store from before leaf hashes existed gets them.
            node.layout.leaf_list(blob).unlink()
            assert (await verify(node)).result["checked"] == 2
            assert leaf_hash_file.is_verified(node.layout, blob)
