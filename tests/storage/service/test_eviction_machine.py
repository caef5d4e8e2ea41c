"""A store through a long life of models downloaded, used, pinned, placed, deleted and evicted, and of restarts.

Decisions and disk are the service's own; the free space of the disk is computed from its files.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shoal_common.errors import QuotaExceeded
from shoal_common.names import ModelId
from shoal_common.settings.node import StorageSettings
from shoal_common.store.verification_stamp import write_stamp
from shoal_storage.admission.admission import Admission, admit
from shoal_storage.eviction.planner import find_garbage, plan_eviction, protected_models
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.ledger.references import arriving_models, blobs_freed_by
from shoal_storage.ledger.usage import ModelUser
from shoal_storage.startup import recover_store
from shoal_storage.store.commit import commit_blob, delete_blob, seal_model
from shoal_storage.store.partials import delete_partial, verify_partial, write_partial
from shoal_storage.store.store import Store
from shoal_storage.store.tombstones import begin_delete, finish_delete
from tests.harness.memory_directory import directory_in_memory
from tests.storage.store_fixtures import Model, check_invariants, put, sha256

FILES = {f"file-{n}": bytes([n]) * size for n, size in enumerate([0, 1, 90, 150, 200, 300, 400])}
MODELS = [
    Model(f"org/{n}", {path: FILES[f"file-{path}"] for path in paths})
    for n, paths in enumerate(["0", "12", "23", "345", "56", "6", "136", "4"])
]
A_MODEL = st.sampled_from(MODELS)


class EvictionMachine(RuleBasedStateMachine):
    """One store. `free_bytes` is what a disk of `total_bytes` with nothing else on it would have."""

    @initialize(
        quota=st.none() | st.integers(500, 1300),
        total=st.integers(600, 1500),
        headroom=st.integers(0, 100),
        policy=st.sampled_from(["lru"] * 7 + ["manual"]),
    )
    def begin(self, quota: int | None, total: int, headroom: int, policy: str) -> None:
        self.stack = ExitStack()
        self.root = self.stack.enter_context(directory_in_memory())
        self.limits = StorageSettings(quota, headroom, "lru" if policy == "lru" else "manual")
        self.total_bytes, self.now_s = total, 1_700_000_000.0
        self.used_by: dict[ModelId, list[ModelUser]] = {}
        self.open()
        for model in MODELS[1:5]:
            self.now_s += 1
            self.pull(model)

    def open(self) -> None:
        self.disk = Store(self.root)
        self.disk.open()
        self.ledger = recover_store(self.disk)
        self.metadata = MetadataFiles(self.disk.layout, self.ledger)
        self.metadata.read()

    def teardown(self) -> None:
        if hasattr(self, "root"):
            with self.stack:
                check_invariants(self.root)

    def blob_bytes(self) -> int:
        """The bytes on disk, by its files."""
        return sum(p.stat().st_size for p in self.disk.layout.blobs.glob("*/*"))

    @property
    def free_bytes(self) -> int:
        partials = self.disk.layout.partials.glob("*/data")
        return self.total_bytes - self.blob_bytes() - sum(p.stat().st_size for p in partials)

    def measure(self) -> None:
        for blob in self.ledger.arrivals.partials:
            size_bytes = (self.disk.layout.partial(blob) / "data").stat().st_size
            self.ledger.arrivals.record_allocated(blob, size_bytes, 0)

    def remove(self, model: ModelId) -> int:
        ledger = self.ledger
        leaving = [b for b in blobs_freed_by(model, ledger) if b in ledger.blobs]
        begin_delete(self.disk, model)
        finish_delete(self.disk, model, leaving)
        self.metadata.delete_records(model)
        ledger.drop_manifest(model)
        freed = sum(ledger.drop_blob(b) for b in leaving)
        self.end_reservation(model)
        return freed

    def end_reservation(self, model: ModelId) -> None:
        self.metadata.end_reservation(model)
        for blob, partial in list(self.ledger.arrivals.partials.items()):
            remaining = partial.without_model(model)
            if remaining.models:
                write_partial(self.disk, blob, partial.size_bytes, remaining.models)
            else:
                delete_partial(self.disk, blob)
            self.ledger.arrivals.release_blob(blob, model)

    def admit_with_eviction(self, model: Model) -> Admission | None:
        """Admit, evicting by a plan where that helps, and compare what was evicted with the plan."""
        self.measure()
        try:
            return admit(model.sealed, self.ledger, self.limits, self.free_bytes)
        except QuotaExceeded as refused:
            need = refused.details["shortfall_bytes"]
        kept = protected_models(self.ledger, self.used_by)
        made, before = plan_eviction(need, self.ledger, self.ledger.uses.last_uses, kept), self.blob_bytes()
        if self.limits.eviction_policy == "manual" or not made.enough:
            return None
        for blob in made.garbage:
            delete_blob(self.disk, blob)
            self.ledger.drop_blob(blob)
        for victim in made.victims:
            assert (
                victim.model
                not in self.ledger.uses.pinned | self.used_by.keys() | self.ledger.arrivals.reservations.keys()
            ), "I4"
            assert self.remove(victim.model) == victim.freed_bytes
        freed = before - self.blob_bytes()
        assert abs(freed - made.freed_bytes) <= made.freed_bytes // 100, f"freed {freed} of {made.freed_bytes}"
        return admit(model.sealed, self.ledger, self.limits, self.free_bytes)  # a plan that is sufficient is enough

    @rule(model=A_MODEL)
    def reserve(self, model: Model) -> None:
        is_new = model.name not in self.ledger.arrivals.reservations
        self.ledger.arrivals.reserve(model.name, model.blobs)
        admission = self.admit_with_eviction(model)
        if admission is None:
            if is_new:
                self.ledger.arrivals.end_reservation(model.name)
            return
        self.metadata.write_reservation(model.name)
        for blob in admission.missing:
            self.ledger.arrivals.reserve_blob(blob, len(model.blobs[blob]), model.name)
            partial = self.ledger.arrivals.partials[blob]
            write_partial(self.disk, blob, partial.size_bytes, partial.models)

    @precondition(lambda self: self.ledger.arrivals.partials)
    @rule(data=st.data(), whole=st.booleans())
    def receive(self, data: st.DataObject, whole: bool) -> None:
        blob = data.draw(st.sampled_from(sorted(self.ledger.arrivals.partials)))
        (content,) = [c for c in FILES.values() if sha256(c) == blob]
        put(self.disk.layout, blob, content if whole else content[: len(content) // 2])
        if whole:
            commit_blob(self.disk, blob, verify_partial(self.disk, blob, len(content)))
            self.ledger.commit_blob(blob, blob, self.ledger.arrivals.partials[blob].size_bytes)

    @rule(model=A_MODEL)
    def pull(self, model: Model) -> None:
        self.reserve(model)
        if model.name in self.ledger.arrivals.reservations:
            self.fetch_rest(model.name)

    @rule(model=A_MODEL)
    def pull_and_use(self, model: Model) -> None:
        self.pull(model)
        self.use(model)

    @precondition(lambda self: self.ledger.arrivals.reservations)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.fetch_rest(data.draw(st.sampled_from(sorted(self.ledger.arrivals.reservations))))

    def fetch_rest(self, name: ModelId) -> None:
        (model,) = [m for m in MODELS if m.name == name]
        for blob in sorted(self.ledger.arrivals.partials.keys() & model.blobs.keys()):
            put(self.disk.layout, blob, model.blobs[blob])
            commit_blob(self.disk, blob, verify_partial(self.disk, blob, len(model.blobs[blob])))
            self.ledger.commit_blob(blob, blob, self.ledger.arrivals.partials[blob].size_bytes)
        assert model.blobs.keys() <= self.ledger.blobs.keys(), f"I4: bytes went from under the fetch of {name}"
        seal_model(self.disk, model.sealed)
        self.ledger.seal(model.sealed)
        self.metadata.record_arrival(name)
        self.end_reservation(name)

    @precondition(lambda self: self.ledger.arrivals.reservations)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.ledger.arrivals.reservations)))
        self.end_reservation(name) if name in self.ledger.manifests else self.remove(name)

    @rule(model=A_MODEL)
    def use(self, model: Model) -> None:
        self.now_s += 1
        self.metadata.record_use([model.name], self.now_s)

    @precondition(lambda self: self.ledger.manifests)
    @rule(data=st.data(), pinned=st.sampled_from([True, False, False]))
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        model = data.draw(st.sampled_from(sorted(self.ledger.manifests)))
        (self.metadata.pin if pinned else self.metadata.unpin)(model)

    @precondition(lambda self: self.ledger.manifests)
    @rule(data=st.data(), placed=st.sampled_from([True, False, False]))
    def place(self, data: st.DataObject, placed: bool) -> None:
        model = data.draw(st.sampled_from(sorted(self.ledger.manifests)))
        if placed:
            self.used_by[model] = [ModelUser("instance i-1", "i-1")]
        else:
            self.used_by.pop(model, None)

    @rule(model=st.sampled_from(MODELS[:3]))
    def delete(self, model: Model) -> None:
        if model.name in self.ledger.uses.pinned or model.name in self.used_by:
            return  # refused
        if model.name in self.ledger.manifests or arriving_models(model.manifest.repo, "", self.ledger):
            self.remove(model.name)

    @rule()
    def leave_garbage(self) -> None:
        content = b"x" * 70
        path = self.disk.layout.blob(sha256(content))
        fits = self.limits.quota_bytes is None or (
            self.ledger.used_bytes + self.ledger.reserved_bytes + len(content) <= self.limits.quota_bytes
        )
        self.measure()
        room = self.free_bytes - self.ledger.arrivals.in_flight_bytes - self.limits.headroom_bytes
        if fits and len(content) <= room and not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            assert write_stamp(path.name, path)
            self.ledger.add_blob(path.name, len(content))

    @rule()
    def collect_garbage(self) -> None:
        for blob in find_garbage(self.ledger):
            delete_blob(self.disk, blob)
            self.ledger.drop_blob(blob)

    @rule()
    def restart(self) -> None:
        self.metadata.write_uses()
        before = self.ledger
        self.disk.close()
        self.open()
        assert (self.ledger.blobs, self.ledger.uses.pinned) == (before.blobs, before.uses.pinned)
        assert self.ledger.manifests.keys() == before.manifests.keys() and not self.ledger.incomplete
        fetched = {m: b for m, b in before.arrivals.reservations.items() if m not in before.manifests}
        assert self.ledger.arrivals.reservations == fetched, "what fetches count on is remembered"
        assert {m: round(s, 3) for m, s in self.ledger.uses.last_uses.items()} == {
            m: round(s, 3) for m, s in before.uses.last_uses.items()
        }

    @invariant()
    def I3_the_quota_and_the_headroom_hold(self) -> None:
        used, reserved = self.blob_bytes(), self.ledger.reserved_bytes
        assert used == self.ledger.used_bytes, "the ledger says what the disk holds"
        if self.limits.quota_bytes is not None:
            assert used + reserved <= self.limits.quota_bytes
        if used + reserved:
            self.measure()
            assert self.free_bytes - self.ledger.arrivals.in_flight_bytes >= self.limits.headroom_bytes

    @invariant()
    def I4_pinned_used_and_reserved_models_are_present(self) -> None:
        on_disk = {p.name for p in self.disk.layout.blobs.glob("*/*")}
        for model in (self.ledger.uses.pinned | self.used_by.keys()) & {m.name for m in MODELS}:
            assert model in self.ledger.manifests, f"{model} went"
        for manifest in self.ledger.manifests.values():
            assert manifest.blob_sizes.keys() <= on_disk, f"a blob of {manifest.model} went"
        for blobs in self.ledger.arrivals.reservations.values():
            assert blobs <= on_disk | self.ledger.arrivals.partials.keys(), "what a fetch counts on went"


@pytest.mark.parametrize("lives", [90, pytest.param(1000, marks=pytest.mark.long)])
def test_I3_I4_no_life_of_a_store_breaks_its_limits_or_pins(lives: int) -> None:
    run_state_machine_as_test(
        EvictionMachine,
        settings=settings(
            max_examples=lives,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
