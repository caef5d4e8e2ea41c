"""Pins, last uses and reservations are on disk when they have to be, and gone when they should be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal_common.errors import InternalError
from shoal_common.names import ModelId, model_id
from shoal_storage.eviction.planner import find_garbage
from shoal_storage.files.metadata_files import MetadataFiles
from tests.storage.store_fixtures import Model, StoreFixture, files_of, put

THEN_S = 1_600_000_000.25


def opened(root: Path) -> tuple[StoreFixture, MetadataFiles]:
    """A store with its metadata files, as a start finds them; closes an earlier one."""
    store = StoreFixture(root)
    metadata = MetadataFiles(store.layout, store.ledger)
    metadata.read()
    return store, metadata


def reopened(store: StoreFixture) -> tuple[StoreFixture, MetadataFiles]:
    store.disk.close()
    return opened(store.root)


def entries(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir()} if directory.exists() else set()


def test_a_pin_survives_a_restart_and_so_does_its_end(root: Path, apples: Model, pears: Model) -> None:
    store, metadata = opened(root)
    store.bring_in(apples)
    store.bring_in(pears)
    metadata.pin(apples.name)
    metadata.pin(apples.name)
    assert entries(root / "pins") == {f"org--apples@{apples.manifest.commit}"}
    store, metadata = reopened(store)
    assert store.ledger.uses.pinned == {apples.name}
    metadata.unpin(apples.name)
    metadata.unpin(pears.name)
    store, metadata = reopened(store)
    assert store.ledger.uses.pinned == set()


def test_a_pin_and_a_use_are_synced_before_they_are_acknowledged(
    root: Path, apples: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, metadata = opened(root)
    store.bring_in(apples)
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    metadata.pin(apples.name)
    file = f"org--apples@{apples.manifest.commit}"
    assert synced == ["store", file, "pins"]
    synced.clear()
    metadata.record_use([apples.name], THEN_S)
    metadata.write_uses()
    assert synced == ["store", file, "uses"]
    synced.clear()
    metadata.unpin(apples.name)
    assert synced == ["pins"]


def test_a_pin_that_cannot_be_written_is_refused_and_not_claimed(root: Path, apples: Model) -> None:
    store, metadata = opened(root)
    store.bring_in(apples)
    (root / "pins").write_bytes(b"not a directory")
    with pytest.raises(InternalError, match=r"cannot write the pin of org/apples@"):
        metadata.pin(apples.name)
    assert store.ledger.uses.pinned == set()


def test_a_use_is_in_memory_at_once_and_on_the_disk_when_written(root: Path, apples: Model) -> None:
    store, metadata = opened(root)
    store.bring_in(apples)
    metadata.record_arrival(apples.name)
    came_s = store.layout.manifest(apples.manifest.model).stat().st_mtime
    assert store.ledger.uses.last_uses == {apples.name: came_s}, "a model that never ran counts from its download"
    metadata.record_use([apples.name, model_id("org/not-here", "c" * 40), ModelId("../../etc")], THEN_S)
    assert store.ledger.uses.last_uses == {apples.name: THEN_S}
    assert entries(root / "uses") == set()
    metadata.write_uses()
    assert entries(root / "uses") == {f"org--apples@{apples.manifest.commit}"}
    store, metadata = reopened(store)
    assert store.ledger.uses.last_uses == {apples.name: THEN_S}
    metadata.record_arrival(apples.name)
    assert store.ledger.uses.last_uses == {apples.name: THEN_S}, "sealed again, it was used when it was used"


def test_nothing_new_writes_nothing(root: Path, apples: Model) -> None:
    store, metadata = opened(root)
    store.bring_in(apples)
    metadata.record_use([apples.name], THEN_S)
    metadata.write_uses()
    use = store.layout.use(apples.manifest.model)
    os.utime(use, (1.0, 1.0))
    metadata.write_uses()
    assert use.stat().st_mtime == 1.0


def test_a_use_that_could_not_be_written_is_written_next_time(root: Path, apples: Model) -> None:
    store, metadata = opened(root)
    store.bring_in(apples)
    metadata.record_use([apples.name], THEN_S)
    (root / "uses").write_bytes(b"in the way")
    metadata.write_uses()
    assert store.ledger.uses.last_uses == {apples.name: THEN_S}
    (root / "uses").unlink()
    metadata.write_uses()
    assert reopened(store)[0].ledger.uses.last_uses == {apples.name: THEN_S}


def test_metadata_of_a_model_goes_with_it(root: Path, apples: Model, pears: Model) -> None:
    store, metadata = opened(root)
    for model in (apples, pears):
        store.bring_in(model)
        metadata.pin(model.name)
        metadata.record_use([model.name], THEN_S)
    metadata.write_uses()
    store.delete(apples)
    metadata.delete_records(apples.name)
    assert store.ledger.uses.pinned == store.ledger.uses.last_uses.keys() == {pears.name}
    store.delete(pears)  # and a crash before it is forgotten
    store, metadata = reopened(store)
    assert not entries(root / "pins") and not entries(root / "uses")
    store.bring_in(pears)
    metadata.record_arrival(pears.name)
    assert store.ledger.uses.last_uses[pears.name] > THEN_S, "a model that arrived again is not the first to go"


def test_a_model_that_cannot_be_read_now_keeps_its_pin(root: Path, apples: Model) -> None:
    store, metadata = opened(root)
    store.bring_in(apples)
    metadata.pin(apples.name)
    manifest = store.layout.manifest(apples.manifest.model)
    good = manifest.read_bytes()
    manifest.write_bytes(b"{")
    store, metadata = reopened(store)
    assert store.ledger.uses.pinned == set()
    manifest.write_bytes(good)
    assert reopened(store)[0].ledger.uses.pinned == {apples.name}


@pytest.mark.parametrize(
    "name", ["a", "org--apples", "org--apples@main", "--@" + "c" * 40, "org/x", "x" * 200, ".x.new"]
)
def test_I10_foreign_files_among_them_are_left_alone(root: Path, apples: Model, name: str) -> None:
    store, _ = opened(root)
    store.bring_in(apples)
    for directory in (root / "pins", root / "uses", root / "promises"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"mine")
    store, _ = reopened(store)
    assert (
        not store.ledger.uses.pinned
        and not store.ledger.arrivals.reservations
        and store.ledger.uses.last_uses.keys() == {apples.name}
    )
    assert name == ".x.new" or (root / "pins" / name).read_bytes() == b"mine"


def test_I4_committed_blobs_of_a_fetch_are_no_garbage_at_restart(root: Path, apples: Model) -> None:
    store, metadata = opened(root)
    first, *rest = store.reserve(apples)
    store.ledger.arrivals.reserve(apples.name, apples.blobs)
    metadata.write_reservation(apples.name)
    put(store.layout, first, apples.blobs[first])
    committed = store.commit(first)
    store.ledger.arrivals.extend_reservation(apples.name, [committed])
    metadata.write_reservation(apples.name)
    store, metadata = reopened(store)
    assert store.ledger.arrivals.reservations == {apples.name: {committed, *apples.blobs}}
    assert find_garbage(store.ledger) == []
    for blob in rest:
        put(store.layout, blob, apples.blobs[blob])
        store.commit(blob)
    store.seal(apples)
    store, metadata = reopened(store)  # a crash before the end of the download was recorded
    assert store.ledger.arrivals.reservations == {}
    assert {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir()} - {"VERSION", "lock"} == files_of(
        apples
    )
