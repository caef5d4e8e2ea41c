"""What storage admits: never more than fits, and nothing counted twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_common.errors import BadInput, QuotaExceeded
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.names import model_id
from shoal_common.settings.node import StorageSettings
from shoal_storage.admission.admission import admit
from shoal_storage.ledger.entries import PartialBlobInfo
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import blobs_freed_by, matching_manifests, referenced_blobs
from tests.storage.ledger_builder import build_ledger

SIZES = [0, 1, 7, 10, 30, 64, 100, 250]
BLOBS = {f"{n:064x}": size for n, size in enumerate(SIZES)}
MODELS = [f"org/model-{n}" for n in range(4)]
COMMIT = "c" * 40


def manifest_of(repo: str, blobs: list[str]) -> Manifest:
    files = [ManifestFile(path=f"file-{n}", size_bytes=BLOBS[b], sha256=b) for n, b in enumerate(blobs)]
    return Manifest(repo=repo, commit=COMMIT, files=files)


MANIFESTS = st.builds(
    manifest_of, st.sampled_from(MODELS), st.lists(st.sampled_from(sorted(BLOBS)), min_size=1, max_size=6)
)


class AdmissionMachine(RuleBasedStateMachine):
    """A disk on which models are reserved, arrive in pieces, are committed, cancelled, sealed and deleted."""

    @initialize(total=st.integers(0, 500), headroom=st.integers(0, 100), quota=st.none() | st.integers(0, 700))
    def begin(self, total: int, headroom: int, quota: int | None) -> None:
        self.total_bytes, self.limits, self.ledger = total, StorageSettings(quota, headroom), Ledger()

    @property
    def free_bytes(self) -> int:
        allocated = sum(p.allocated_bytes for p in self.ledger.arrivals.partials.values())
        return self.total_bytes - self.ledger.used_bytes - allocated

    @rule(manifest=MANIFESTS)
    def reserve(self, manifest: Manifest) -> None:
        ledger = self.ledger
        new = {
            b: s
            for b, s in manifest.blob_sizes.items()
            if b not in ledger.blobs and b not in ledger.arrivals.partials
        }
        fits_quota = self.limits.quota_bytes is None or (
            ledger.used_bytes + ledger.reserved_bytes + sum(new.values()) <= self.limits.quota_bytes
        )
        fits_disk = (
            self.free_bytes - ledger.arrivals.in_flight_bytes - sum(new.values()) >= self.limits.headroom_bytes
        )
        try:
            admission = admit(manifest, ledger, self.limits, self.free_bytes)
        except QuotaExceeded as e:
            assert sum(new.values()) > 0, "nothing new is needed, and it was refused"
            assert not (fits_quota and fits_disk)
            assert e.details["needed_bytes"] == sum(new.values())
            assert e.details["free_bytes"] == self.free_bytes
            assert e.details["quota_bytes"] == self.limits.quota_bytes
            assert e.details["used_bytes"] == ledger.used_bytes
            assert e.details["reserved_bytes"] == ledger.reserved_bytes
            return
        assert (fits_quota and fits_disk) or not sum(new.values())
        assert admission.needed_bytes == sum(new.values())
        assert sorted(admission.present + admission.missing) == sorted(manifest.blob_sizes)
        for blob in admission.missing:
            ledger.arrivals.reserve_blob(blob, BLOBS[blob], manifest.model)
        ledger.arrivals.reserve(manifest.model, manifest.blob_sizes)

    @precondition(lambda self: self.ledger.arrivals.partials)
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        blob = data.draw(st.sampled_from(sorted(self.ledger.arrivals.partials)))
        partial = self.ledger.arrivals.partials[blob]
        allocated_bytes = data.draw(st.integers(partial.allocated_bytes, partial.size_bytes))
        self.ledger.arrivals.record_allocated(blob, allocated_bytes, 0)

    @precondition(lambda self: self.ledger.arrivals.partials)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        blob = data.draw(st.sampled_from(sorted(self.ledger.arrivals.partials)))
        self.ledger.commit_blob(blob, blob, self.ledger.arrivals.partials[blob].size_bytes)

    @rule(repo=st.sampled_from(MODELS))
    def cancel(self, repo: str) -> None:
        model = model_id(repo, COMMIT)
        others = set(self.ledger.arrivals.reservations) - {model}
        counted_on = {m: self.ledger.arrivals.reservations[m] & self.present for m in others}
        for blob in blobs_freed_by(model, self.ledger):
            self.ledger.drop_blob(blob)
        for blob, partial in list(self.ledger.arrivals.partials.items()):
            if model in partial.models:
                self.ledger.arrivals.release_blob(blob, model)
        self.ledger.arrivals.end_reservation(model)
        for other in others:
            assert counted_on[other] <= self.present, f"giving up {model} took bytes from {other}"

    @property
    def present(self) -> set[str]:
        return {*self.ledger.blobs, *self.ledger.arrivals.partials}

    @invariant()
    def I3_present_and_reserved_bytes_fit_the_quota(self) -> None:
        if self.limits.quota_bytes is not None:
            assert self.ledger.used_bytes + self.ledger.reserved_bytes <= self.limits.quota_bytes

    @invariant()
    def I3_reserved_bytes_can_arrive_and_leave_the_headroom(self) -> None:
        if self.ledger.reserved_bytes + self.ledger.used_bytes:
            assert self.free_bytes - self.ledger.arrivals.in_flight_bytes >= self.limits.headroom_bytes

    @invariant()
    def nothing_is_both_present_and_arriving(self) -> None:
        assert not set(self.ledger.blobs) & set(self.ledger.arrivals.partials)
        assert not set(self.ledger.arrivals.partials) - referenced_blobs(self.ledger), "a partial that nobody wants"


AdmissionMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
test_I3_no_sequence_reserves_more_than_there_is = AdmissionMachine.TestCase


def test_a_refusal_has_needed_quota_used_and_a_remedy() -> None:
    ledger = build_ledger({"a" * 64: 60})
    with pytest.raises(QuotaExceeded) as refused:
        admit(manifest_of("org/model", [f"{7:064x}"]), ledger, StorageSettings(300, 0), 10**6)
    assert str(refused.value) == (
        "org/model needs 250 B; the quota of 300 B has 240 B left (60 B used, 0 B reserved): "
        "remove a model with `shoal rm`, or raise the quota with `shoal storage set --max-storage`"
    )
    with pytest.raises(
        QuotaExceeded, match=r"the disk has 150 B available \(200 B free, 50 B headroom, 0 B reserved\)"
    ):
        admit(manifest_of("org/model", [f"{7:064x}"]), ledger, StorageSettings(None, 50), 200)


def test_I3_reserved_unwritten_bytes_are_not_reserved_twice() -> None:
    blob = f"{7:064x}"
    ledger = build_ledger(
        partials={f"{6:064x}": PartialBlobInfo(100, allocated_bytes=40, models={model_id("org/other", COMMIT)})}
    )
    with pytest.raises(QuotaExceeded, match=r"\(300 B free, 0 B headroom, 60 B reserved\)"):
        admit(manifest_of("org/model", [blob]), ledger, StorageSettings(None, 0), 300)
    assert admit(manifest_of("org/model", [blob]), ledger, StorageSettings(None, 0), 310).missing == [blob]


def test_nothing_needed_is_approved_however_full_the_disk() -> None:
    blob = f"{7:064x}"
    ledger = build_ledger({blob: BLOBS[blob]})
    admission = admit(manifest_of("org/model", [blob, blob]), ledger, StorageSettings(0, 10**12), 0)
    assert (admission.present, admission.missing, admission.needed_bytes) == ([blob], [], 0)


def test_a_blob_whose_size_changed_on_the_disk_is_fetched_again() -> None:
    blob = f"{7:064x}"
    admission = admit(manifest_of("org/model", [blob]), build_ledger({blob: 3}), StorageSettings(None, 0), 1000)
    assert admission.missing == [blob]


def test_I3_a_manifest_cannot_enlarge_what_another_reserved() -> None:
    blob = f"{7:064x}"
    ledger = build_ledger(partials={blob: PartialBlobInfo(1, models={model_id("org/liar", COMMIT)})})
    with pytest.raises(BadInput, match=r"250 bytes, but another download reserved it with 1"):
        admit(manifest_of("org/model", [blob]), ledger, StorageSettings(300, 0), 1000)


def test_a_model_is_meant_by_its_name_its_branch_or_its_commit() -> None:
    old = Manifest(repo="org/model", commit="1" * 40, files=[], revisions=["v1"])
    new = Manifest(repo="org/model", commit="2" * 40, files=[], revisions=["main"])
    other = Manifest(repo="org/other", commit="3" * 40, files=[], revisions=["main"])
    every = [old, new, other]
    assert matching_manifests("org/model", "", every) == [old, new]
    assert matching_manifests("org/model", "main", every) == [new]
    assert matching_manifests("org/model", "1" * 40, every) == [old]
    assert matching_manifests("org/model", "v2", every) == []
