"""How the ledger is updated from a scan: whatever differs, afterwards it matches the disk exactly."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import ModelId, model_id
from shoal_storage.ledger.entries import BlobFileStat, ForeignFiles
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.scan.diff import apply_diff, diff_store, is_trusted
from shoal_storage.scan.scanner import StoreScan, scan_store
from shoal_storage.scan.unverified import next_to_verify
from tests.storage.store_fixtures import Model, StoreFixture, files_below, put, sha256

BLOBS = [f"{n:x}" * 64 for n in range(6)]
SIZES = dict(zip(BLOBS, (1, 2, 3, 4, 5, 6), strict=True))


def manifest_of(number: int, blobs: list[str]) -> Manifest:
    """A model with these blobs."""
    files = [ManifestFile(path=f"file-{b[0]}", size_bytes=SIZES[b], sha256=b) for b in blobs]
    return Manifest(repo=f"org/model-{number}", commit=f"{number:040x}", files=files)


manifests = st.integers(0, 4).flatmap(
    lambda n: st.lists(st.sampled_from(BLOBS), min_size=1, max_size=3, unique=True).map(lambda b: manifest_of(n, b))
)
held = st.lists(manifests, max_size=5).map(lambda found: {m.model: m for m in found})
stamps = st.builds(
    BlobFileStat,
    size_bytes=st.integers(1, 6),
    mtime_ns=st.integers(0, 2),
    inode=st.integers(1, 2),
    is_verified=st.booleans(),
)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """A valid ledger: complete models complete, incomplete ones not, no blob both verified and unverified."""
    ledger = Ledger()
    for blob in draw(st.sets(st.sampled_from(BLOBS))):
        ledger.add_blob(blob, draw(st.sampled_from([SIZES[blob], 9])))
    for blob in draw(st.sets(st.sampled_from(BLOBS))) - ledger.blobs.keys():
        ledger.add_unverified(blob, draw(stamps))
        if draw(st.booleans()):
            ledger.mark_corrupt(blob, ledger.unverified[blob])
    for manifest in draw(held).values():
        ledger.add_manifest(manifest)
    ledger.mark_complete()
    incomplete = st.sampled_from(sorted(ledger.incomplete)) if ledger.incomplete else st.nothing()
    for model in draw(st.sets(incomplete)):
        ledger.arrivals.reserve(model, [])
    ledger.set_foreign(ForeignFiles(draw(st.integers(0, 3))))
    return ledger


seens = st.builds(
    StoreScan,
    blobs=st.dictionaries(st.sampled_from(BLOBS), stamps),
    manifests=held,
    unreadable_models=st.sets(st.sampled_from([manifest_of(n, BLOBS[:1]).model for n in range(5)]), max_size=1),
    foreign=st.builds(ForeignFiles, st.integers(0, 3)),
)


@given(ledgers(), seens)
def test_I1_applying_a_diff_trusts_no_new_file(ledger: Ledger, seen: StoreScan) -> None:
    seen.unreadable_models -= seen.manifests.keys()
    before = dict(ledger.blobs)
    whole_before, known_before = dict(ledger.manifests), dict(ledger.stored_manifests)
    wrong_before = dict(ledger.corrupt)
    followed = apply_diff(diff_store(ledger, seen), ledger)
    # Every file in a blob's place is either the blob that it was, or waits to be hashed.
    assert ledger.blobs.keys() | ledger.unverified.keys() == seen.blobs.keys()
    assert not ledger.blobs.keys() & ledger.unverified.keys()
    for blob, size_bytes in ledger.blobs.items():
        assert before[blob] == size_bytes == seen.blobs[blob].size_bytes and seen.blobs[blob].is_verified
    assert all(ledger.unverified[b].same_file(seen.blobs[b]) for b in ledger.unverified)
    assert {b for b, s in wrong_before.items() if b in seen.blobs and s.same_file(seen.blobs[b])} == set(
        ledger.corrupt
    )
    assert set(next_to_verify(ledger)) == ledger.unverified.keys() - ledger.corrupt.keys()
    # Every manifest that was read is in the ledger, and one that could not be read is unchanged.
    stays = {m: known_before[m] for m in seen.unreadable_models & known_before.keys()}
    assert ledger.stored_manifests == {**seen.manifests, **stays}
    for model, manifest in ledger.stored_manifests.items():
        assert (model in ledger.manifests) == (
            ledger.is_complete(manifest) and self_sealed(model, ledger, whole_before)
        )
    assert set(followed.lost_models) == whole_before.keys() - ledger.manifests.keys()
    assert set(followed.found_models) == {m for m, found in ledger.manifests.items() if whole_before.get(m) != found}
    assert ledger.foreign == seen.foreign
    again = diff_store(ledger, seen)
    assert not again.changes_ledger(ledger), "what was followed is no difference any more"


def self_sealed(model: ModelId, ledger: Ledger, whole_before: dict[ModelId, Manifest]) -> bool:
    """A model being downloaded becomes complete when the download seals it; a complete one stays so."""
    return model not in ledger.arrivals.reservations or model in whole_before


@given(stamps, st.booleans())
def test_I1_a_start_trusts_only_files_with_a_stamp_or_a_list(stamp: BlobFileStat, listed: bool) -> None:
    assert is_trusted(stamp, listed) == (stamp.is_verified or listed)


def test_a_scan_of_an_untouched_store_differs_in_nothing(root: Path, apples: Model, pears: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    store.bring_in(pears)
    store.reserve(Model("org/coming", {"a": b"later"}))
    seen = scan_store(store.layout)
    assert not diff_store(store.ledger, seen).changes_ledger(store.ledger)
    assert seen.foreign == ForeignFiles() and seen.manifests == {m.name: m.sealed for m in (apples, pears)}


def test_a_scan_counts_every_foreign_file_and_changes_none(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    paths = store.layout
    strange = [
        root / "index.db",
        root / "notes" / "deep" / "more.txt",
        paths.blobs.parent / "md5" / "x",
        paths.blobs / "zz" / ("ab" * 32),
        paths.blobs / "ab" / "README",
        paths.blobs / "gi" / ("git-" + "a" * 40),
        paths.partials / "README" / "data",
        paths.manifests / "org--apples" / "readme.json",
        paths.manifests / "stray.json",
        paths.views / "mine" / "model.bin",
        paths.view(apples.sealed.model) / "sub" / "mine.txt",
        paths.view(model_id(apples.sealed.repo, "e" * 40)) / "left.txt",
        paths.pins / "no-model",
        paths.quarantine / "no-blob",
    ]
    for path in strange:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine!")
    (root / "link").symlink_to("/nowhere")
    (paths.manifests / "org--apples" / ".readme.json.new").write_bytes(b"ours, unfinished")
    before = files_below(root)
    seen = scan_store(paths)
    size_bytes = 5 * len(strange) + len("/nowhere")
    assert (seen.foreign.count, seen.foreign.size_bytes) == (len(strange) + 1, size_bytes)
    named = {str(p.relative_to(root)) for p in (*strange, root / "link")}
    assert len(seen.foreign.paths) == 5 and set(seen.foreign.paths) <= named
    assert files_below(root) == before
    del store
    again = StoreFixture(root)
    assert {str(p.relative_to(root)) for p in strange} <= files_below(root), "a start leaves them too"
    assert again.ledger.foreign.count == len(strange) + 1
    again.delete(apples)
    assert {str(p.relative_to(root)) for p in strange} <= files_below(root), "and so does a deletion"


def test_links_of_a_view_without_a_manifest_are_removed_at_start(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    store.layout.manifest(apples.sealed.model).unlink()
    seen = scan_store(store.layout)
    assert seen.foreign == ForeignFiles() and not seen.manifests
    followed = apply_diff(diff_store(store.ledger, seen), store.ledger)
    assert followed.lost_models == [apples.name] and not store.ledger.stored_manifests
    del store
    assert StoreFixture(root).ledger.blobs.keys() == set(apples.sealed.blob_sizes)
    assert not list((root / "views").rglob("*.bin"))


def test_I1_a_copy_or_a_written_file_has_no_valid_stamp(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    store.bring_in(apples)
    blob = sha256(apples.bytes["sub/weights.bin"])
    path = store.layout.blob(blob)
    assert scan_store(store.layout).blobs[blob].is_verified
    with tempfile.TemporaryDirectory(dir=root.parent) as aside:
        copied = Path(aside, blob)
        shutil.copy2(path, copied)  # mode and times too
        held_open = path.open("rb")  # its inode is not reused
        path.unlink()
        shutil.copy2(copied, path)
        held_open.close()
    stamp = scan_store(store.layout).blobs[blob]
    assert path.stat().st_mode & 0o777 == 0o444 and not stamp.is_verified
    found = diff_store(store.ledger, scan_store(store.layout))
    assert found.lost_blobs == found.replaced_blobs == set(found.unverified) == {blob}


def test_I1_a_pull_replaces_an_unverified_file_of_the_right_size(root: Path, apples: Model) -> None:
    store = StoreFixture(root)
    weights = apples.bytes["sub/weights.bin"]
    path = store.layout.blob(sha256(weights))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0" * len(weights))
    path.chmod(0o644)
    del store
    store = StoreFixture(root)
    assert set(store.ledger.unverified) == {path.name} and store.ledger.used_bytes == len(weights)
    blobs = store.reserve(apples)
    assert path.name in blobs
    for blob in blobs:
        put(store.layout, blob, apples.blobs[blob])
        store.commit(blob)
    assert path.read_bytes() == weights and path.stat().st_mode & 0o777 == 0o444
