"""The ledger's invariants hold whatever happens, and nothing but its own methods changes it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import ModelId, model_id
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_storage.ledger.arrivals import Arrivals
from shoal_storage.ledger.blob_volumes import BlobVolumes
from shoal_storage.ledger.entries import BlobFileStat, PartialBlobInfo, Shard
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.library_model import FileStat, LibraryFile, LibraryModel, LibraryModels
from shoal_storage.ledger.references import referenced_blobs
from shoal_storage.ledger.uses import ModelUses

ROOT = Path(__file__).parents[3]
COMMIT = "c" * 40
SIZES = {f"{n:064x}": size for n, size in enumerate([0, 1, 70, LEAF_BYTES + 5, 3 * LEAF_BYTES])}
GIT_NAMES = {f"git-{n:040x}": blob for n, blob in enumerate(SIZES)}
VOLUMES = ["", "one", "two"]
BLOB, VOLUME = st.sampled_from(sorted(SIZES)), st.sampled_from(VOLUMES)
BLOB_SETS = st.sets(BLOB, max_size=3)


def manifest_of(number: int, blobs: set[str]) -> Manifest:
    files = [ManifestFile(path=b, size_bytes=SIZES[b], sha256=b) for b in sorted(blobs)]
    return Manifest(repo=f"org/{number}", commit=COMMIT, files=files)


NAMES = [model_id(f"org/{n}", COMMIT) for n in range(3)]
MODEL = st.sampled_from(NAMES)
MANIFEST = st.builds(manifest_of, st.integers(0, 2), st.sets(BLOB, min_size=1, max_size=3))


def in_library(manifest: Manifest) -> LibraryModel:
    files = {f.path: LibraryFile(f.path, f"/lib/{f.path}", FileStat(f.size_bytes, 1, 1)) for f in manifest.files}
    return LibraryModel(manifest, "/lib", "/lib", files, {})


class LedgerMachine(RuleBasedStateMachine):
    """Calls of the ledger's methods in any order that their docstrings allow."""

    @initialize(
        volumes=st.dictionaries(BLOB, VOLUME), arriving=st.dictionaries(st.sampled_from(sorted(GIT_NAMES)), VOLUME)
    )
    def begin(self, volumes: dict[str, str], arriving: dict[str, str]) -> None:
        self.volumes = BlobVolumes()
        self.ledger = Ledger(self.volumes)
        for blob, volume in volumes.items():
            self.find_blob(blob, volume)
        for name, volume in arriving.items():
            self.reserve_blob(NAMES[0], name, None, volume)
        if volumes:
            self.find_or_seal(manifest_of(0, set(volumes)))

    def draw_from(self, data: st.DataObject, names: Iterable[str]) -> str:
        return data.draw(st.sampled_from(sorted(names)))

    # Blobs

    @rule(blob=BLOB, volume=VOLUME)
    def find_blob(self, blob: str, volume: str) -> None:
        self.ledger.add_blob(blob, SIZES[blob])
        self.ledger.move_blob(blob, volume)

    @rule(blob=BLOB, volume=VOLUME, inode=st.integers(1, 2))
    def find_file(self, blob: str, volume: str, inode: int) -> None:
        self.ledger.add_unverified(blob, BlobFileStat(7, 1, inode, volume_id=volume))

    @precondition(lambda self: self.ledger.unverified)
    @rule(data=st.data(), outcome=st.sampled_from(["intact", "corrupt", "gone"]))
    def hash_file(self, data: st.DataObject, outcome: str) -> None:
        blob = self.draw_from(data, self.ledger.unverified)
        if outcome == "intact":
            self.ledger.add_blob(blob, SIZES[blob])
        elif outcome == "corrupt":
            self.ledger.mark_corrupt(blob, self.ledger.unverified[blob])
        else:
            self.ledger.drop_unverified(blob)

    @rule(blobs=BLOB_SETS, also_in_libraries=st.booleans())
    def find_missing(self, blobs: set[str], also_in_libraries: bool) -> None:
        complete_before = set(self.ledger.manifests)
        lost = self.ledger.mark_missing(blobs, also_in_libraries)
        assert set(lost) == complete_before - self.ledger.manifests.keys() <= self.ledger.incomplete.keys()
        assert not blobs & self.ledger.blobs.keys()

    @rule(blob=BLOB)
    def quarantine(self, blob: str) -> None:
        self.ledger.quarantine(blob)
        assert blob in self.ledger.quarantined and blob not in self.ledger.blobs

    @rule(blobs=BLOB_SETS, repairable=st.dictionaries(BLOB, st.integers(1, 9)))
    def find_quarantined(self, blobs: set[str], repairable: dict[str, int]) -> None:
        self.ledger.add_quarantined(blobs)
        self.ledger.set_repairable(repairable)

    @rule(blob=BLOB)
    def leave_quarantine(self, blob: str) -> None:
        self.ledger.drop_quarantined(blob)

    @precondition(lambda self: self.ledger.blobs.keys() - referenced_blobs(self.ledger))
    @rule(data=st.data())
    def delete_garbage(self, data: st.DataObject) -> None:
        blob = self.draw_from(data, self.ledger.blobs.keys() - referenced_blobs(self.ledger))
        before = self.ledger.used_bytes
        assert self.ledger.drop_blob(blob) == before - self.ledger.used_bytes

    @precondition(lambda self: self.ledger.blobs)
    @rule(data=st.data(), volume=VOLUME)
    def find_copy(self, data: st.DataObject, volume: str) -> None:
        blob = self.draw_from(data, self.ledger.blobs)
        if volume != self.ledger.volume_by_blob.get(blob, ""):
            self.ledger.add_copy(blob, volume, SIZES[blob])

    @rule(copies=st.dictionaries(BLOB, st.dictionaries(VOLUME, st.just(7), min_size=1), max_size=2))
    def count_copies(self, copies: dict[str, dict[str, int]]) -> None:
        self.ledger.set_copies({b: by for b, by in copies.items() if b in self.ledger.blobs})
        self.ledger.prune_volumes()

    @rule(blob=BLOB)
    def delete_copies(self, blob: str) -> None:
        self.ledger.drop_copies(blob)

    @rule(volume=st.sampled_from(VOLUMES[1:]))
    def detach(self, volume: str) -> None:
        present_elsewhere = {
            blob
            for blob in self.ledger.blobs
            if {self.ledger.volume_by_blob.get(blob, ""), *self.ledger.redundant_copies.get(blob, ())} - {volume}
        }
        self.ledger.detach_volume(volume)
        assert self.ledger.blobs.keys() == present_elsewhere
        assert volume not in self.ledger.volume_by_blob.values()
        assert not any(volume in by_volume for by_volume in self.ledger.redundant_copies.values())

    # Arrivals

    @rule(model=MODEL, blobs=BLOB_SETS, fails=st.booleans())
    def reserve(self, model: ModelId, blobs: set[str], fails: bool) -> None:
        before = self.ledger.arrivals.reservations.get(model)
        try:
            with self.ledger.arrivals.reserving(model, blobs) as changes:
                assert changes == (before != blobs)
                if fails:
                    raise ValueError
        except ValueError:
            assert self.ledger.arrivals.reservations.get(model) == before
        else:
            assert self.ledger.arrivals.reservations[model] == blobs
            assert model not in self.ledger.arrivals.ended_reservations

    @rule(
        model=MODEL,
        name=st.sampled_from(sorted({*SIZES, *GIT_NAMES})),
        leaves=st.none() | st.integers(0, 7),
        volume=VOLUME,
    )
    def reserve_blob(self, model: ModelId, name: str, leaves: int | None, volume: str) -> None:
        size = SIZES[GIT_NAMES.get(name, name)]
        if name not in {*self.ledger.blobs, *self.ledger.arrivals.partials}:
            self.volumes.place(name, volume)
        wanted = None if leaves is None else leaves & leaf_set.all_leaves(size)
        self.ledger.arrivals.reserve_blob(name, size, model, wanted)
        assert self.ledger.arrivals.is_reserved(self.ledger.arrivals.partials[name]) or (
            self.ledger.arrivals.partials[name].models <= self.ledger.arrivals.ended_reservations
        )

    @precondition(lambda self: self.ledger.arrivals.partials)
    @rule(data=st.data(), outcome=st.sampled_from(["received", "committed", "released", "dropped"]))
    def receive(self, data: st.DataObject, outcome: str) -> None:
        arrivals = self.ledger.arrivals
        name = self.draw_from(data, arrivals.partials)
        partial = arrivals.partials[name]
        if outcome == "received":
            arrivals.record_allocated(name, data.draw(st.integers(0, partial.size_bytes)), 0)
            assert arrivals.is_same_arrival(name, partial)
            return
        if outcome == "committed":
            self.ledger.commit_blob(name, GIT_NAMES.get(name, name), partial.size_bytes)
        elif outcome == "released":
            for model in partial.models:
                arrivals.release_blob(name, model)
        else:
            arrivals.drop_partial(name)
        self.only_known_blobs_have_a_volume_or_a_git_name()
        assert not arrivals.is_same_arrival(name, partial)
        arrivals.reserve_blob(name, partial.size_bytes, NAMES[0])
        assert not arrivals.is_same_arrival(name, partial), "it arrives again"

    @rule(model=MODEL, sha256=BLOB)
    def end_or_abandon(self, model: ModelId, sha256: str) -> None:
        self.ledger.arrivals.abandon_reservation(model)
        git_name = next(g for g, b in GIT_NAMES.items() if b == sha256)
        for changed in self.ledger.arrivals.record_sha256(git_name, sha256):
            assert sha256 in self.ledger.arrivals.reservations[changed]

    @rule(model=MODEL)
    def end_reservation(self, model: ModelId) -> None:
        self.ledger.arrivals.end_reservation(model)
        assert model not in {*self.ledger.arrivals.reservations, *self.ledger.arrivals.ended_reservations}

    # Models

    @rule(manifest=MANIFEST)
    def find_or_seal(self, manifest: Manifest) -> None:
        if self.ledger.is_complete(manifest):
            self.ledger.seal(manifest)
        else:
            self.ledger.add_manifest(manifest)

    @rule(manifest=MANIFEST)
    def find_manifest(self, manifest: Manifest) -> None:
        self.ledger.add_manifest(manifest)
        assert manifest.model in self.ledger.incomplete

    @rule()
    def complete(self) -> None:
        for model in self.ledger.mark_complete():
            assert model not in self.ledger.arrivals.reservations

    @precondition(lambda self: self.ledger.manifests)
    @rule(data=st.data(), and_delete=st.booleans())
    def withdraw(self, data: st.DataObject, and_delete: bool) -> None:
        model = ModelId(self.draw_from(data, self.ledger.manifests))
        if and_delete:
            self.ledger.drop_manifest(model)
        else:
            self.ledger.mark_incomplete(model)

    @rule(manifest=MANIFEST)
    def find_deletion(self, manifest: Manifest) -> None:
        self.ledger.add_deletion(manifest)

    @rule(model=MODEL, ends=st.booleans())
    def delete_model(self, model: ModelId, ends: bool) -> None:
        known = self.ledger.stored_manifests.get(model, self.ledger.deleting.get(model))
        assert self.ledger.begin_deletion(model) == known
        if ends:
            self.ledger.end_deletion(model)

    @rule(manifest=MANIFEST, leaves=st.integers(0, 7))
    def add_shard(self, manifest: Manifest, leaves: int) -> None:
        part = {f.sha256: leaves & leaf_set.all_leaves(f.size_bytes) for f in manifest.files}
        self.ledger.add_shard(Shard(manifest, [[0, 1]], part))

    @rule(model=MODEL)
    def drop_shard(self, model: ModelId) -> None:
        self.ledger.drop_shard(model)

    @rule(manifests=st.lists(MANIFEST, max_size=2))
    def scan_libraries(self, manifests: list[Manifest]) -> None:
        self.ledger.libraries.set_models({m.model: in_library(m) for m in manifests})
        self.ledger.recompute_completeness()

    # What always holds

    @invariant()
    def a_blob_is_present_or_unverified(self) -> None:
        ledger = self.ledger
        assert not ledger.blobs.keys() & ledger.unverified.keys()
        assert all(stat.same_file(ledger.unverified[b]) for b, stat in ledger.corrupt.items())

    @invariant()
    def I2_complete_models_have_every_blob(self) -> None:
        for manifest in self.ledger.manifests.values():
            assert all(self.ledger.blob_size(f.sha256) == f.size_bytes for f in manifest.files)

    @invariant()
    def a_model_is_in_one_state(self) -> None:
        ledger = self.ledger
        states = [*ledger.manifests, *ledger.incomplete, *ledger.deleting]
        assert len(states) == len(set(states))

    @invariant()
    def quarantine_has_what_can_be_repaired(self) -> None:
        assert self.ledger.repairable.keys() <= self.ledger.quarantined

    @invariant()
    def only_known_blobs_have_a_volume_or_a_git_name(self) -> None:
        ledger = self.ledger
        known = {*ledger.blobs, *ledger.unverified, *ledger.arrivals.partials, *ledger.quarantined}
        assert ledger.volume_by_blob.keys() <= known and "" not in ledger.volume_by_blob.values()
        assert set(ledger.sha256_by_git_name.values()) <= ledger.blobs.keys()

    @invariant()
    def I3_bytes_are_counted_once(self) -> None:
        ledger = self.ledger
        partial_bytes = sum(ledger.arrivals.reserved_bytes_of(p) for p in ledger.arrivals.partials.values())
        copies_bytes = sum(sum(by.values()) for by in ledger.redundant_copies.values())
        files_bytes = sum(ledger.blobs.values()) + sum(s.size_bytes for s in ledger.unverified.values())
        assert ledger.used_bytes + ledger.reserved_bytes == files_bytes + copies_bytes + partial_bytes
        assert ledger.used_bytes >= 0 and all(n >= 0 for n in ledger.arrivals.in_flight_by_volume.values())


LedgerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_the_invariants_hold_after_any_sequence_of_methods = LedgerMachine.TestCase


def test_a_partial_measured_again_is_the_same_arrival() -> None:
    arrivals = Ledger().arrivals
    arrivals.add_partial("a" * 64, PartialBlobInfo(10, models={NAMES[0]}))
    before = arrivals.partials["a" * 64]
    arrivals.reserve_blob("a" * 64, 10, NAMES[1])
    arrivals.record_allocated("a" * 64, 4, 0)
    assert arrivals.is_same_arrival("a" * 64, before)
    arrivals.release_blob("a" * 64, NAMES[0])
    assert arrivals.partials["a" * 64].models == {NAMES[1]} and arrivals.is_same_arrival("a" * 64, before)
    arrivals.release_blob("a" * 64, NAMES[1])
    assert not arrivals.partials


# Only the ledger's own methods change it

PARTS = (Ledger, Arrivals, LibraryModels, ModelUses, BlobVolumes)
READ_BY_ALL = {name for part in PARTS for name in part.__annotations__}
MUTATORS = {
    *("add", "append", "clear", "difference_update", "discard", "extend", "intersection_update", "pop", "popitem"),
    *("remove", "setdefault", "symmetric_difference_update", "update"),
}
OUTSIDE = sorted(
    p for p in (ROOT / "services" / "storage" / "shoal_storage").rglob("*.py") if p.parent.name != "ledger"
)


def writes_in(source: str) -> Iterator[int]:
    """Yield the lines that change what a ledger holds, or reach into its private attributes."""

    def is_held(node: ast.AST) -> bool:
        while isinstance(node, ast.Subscript):
            node = node.value
        return isinstance(node, ast.Attribute) and node.attr in READ_BY_ALL and of_ledger(node.value)

    def of_ledger(node: ast.AST) -> bool:
        name = ast.unparse(node)
        return any(part in ("ledger", "_ledger", "blob_volumes", "arrivals") for part in name.split("."))

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if is_held(node):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in MUTATORS and is_held(node.func.value):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and of_ledger(node.value):
            yield node.lineno


@pytest.mark.parametrize("source", OUTSIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_outside_the_ledger_writes_it(source: Path) -> None:
    assert list(writes_in(source.read_text())) == []


@pytest.mark.parametrize(
    "statement",
    [
        "ledger.blobs[blob] = 1",
        "self._ledger.arrivals.partials.pop(blob)",
        "del ledger.redundant_copies[blob][volume]",
        "ledger.quarantined |= found",
        "ledger.uses.pinned.add(model)",
        "ledger.arrivals.reservations.setdefault(model, set()).update(blobs)",
        "layout.blob_volumes.by_blob[blob] = volume",
        "ledger._blobs.clear()",
    ],
)
def test_a_write_of_the_ledger_is_recognized(statement: str) -> None:
    assert list(writes_in(statement))
