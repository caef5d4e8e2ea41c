"""What a killed store process (`crash_child_store.py`) acknowledged, and whether the next start still has it."""

from __future__ import annotations

from pathlib import Path

from shoal_storage.files import leaf_hash_file
from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.integrity import blob_check, quarantine
from shoal_storage.integrity.repair import record_good_leaves
from shoal_storage.ledger.references import manifests_with_blob
from shoal_storage.store.views import build_view
from tests.storage.crash_child_model import COMES, LEAVES, STAYS
from tests.storage.crash_child_store import CORRUPT
from tests.storage.store_fixtures import StoreFixture, check_invariants, claimed_leaves, sha256

MODELS = (STAYS, LEAVES, COMES)
OWN = {*LEAVES.blobs, *LEAVES.sealed.blob_sizes} - set(STAYS.blobs)
"""Blobs deleted with the deleted model."""
CALLED = {blob: sha256(data) for m in MODELS for blob, data in m.blobs.items()}


def verify_blob(store: StoreFixture, blob: str) -> None:
    """Do what the verifier does, in case the change of the blob has reached the disk."""
    checked = blob_check.hash_blob(store.disk, blob, lambda _: None)
    assert checked is not None
    if not checked.intact:
        assert quarantine.quarantine_blob(
            store.disk, checked, manifests_with_blob(blob, store.ledger), store.ledger.uses.leases.values()
        )
        store.ledger.quarantine(blob)
        record_good_leaves(store.disk, checked)


class Acknowledged:
    """What a life has acknowledged and not revoked."""

    def __init__(self) -> None:
        self.reserved: set[str] = set()
        """Blobs, by the names they arrive under, that are reserved or present."""
        self.here: set[str] = set()
        """Blobs by sha256."""
        self.gone: set[str] = set()
        self.models: set[str] = set()
        self.deleted: set[str] = set()
        self.pinned: set[str] = set()
        self.may_be_pinned: set[str] = {STAYS.name}

    def hear(self, what: str, which: str) -> None:
        """Take note of a message: from here on it holds, or is being revoked."""
        if what in ("kept-good", "taken-back", "dropped"):
            return  # which files exist is checked by the strict disk; a store that starts may find them or not
        self._hear(what, which)

    def _hear(self, what: str, which: str) -> None:
        if what == "reserving":
            self.gone -= {b for m in MODELS if m.name == which for b in (*m.blobs, *m.sealed.blob_sizes)}
        elif what == "reserved":
            self.reserved.add(which)
            self.gone.discard(which)
            self.deleted -= {m.name for m in MODELS if which in m.blobs}
        elif what == "committed":
            self.here.add(which)
            self.gone.discard(which)
        elif what == "sealed":
            self.models.add(which)
        elif what == "pinned":
            self.pinned.add(which)
        elif what == "setting-aside":
            self.reserved.discard(which)
            self.here.discard(which)
            self.models -= {m.name for m in MODELS if which in m.blobs}
        elif what == "deleting":
            self.models.discard(which)
            self.reserved -= OWN
            self.here -= OWN
        elif what == "deleted":
            self.deleted.add(which)
            self.gone |= OWN
        elif what == "releasing":
            self.reserved.discard(which)
        elif what == "unpinning":
            self.pinned.discard(which)
        elif what == "unpinned":
            self.may_be_pinned.discard(which)
        else:
            assert what in ("quarantined", "released")
            self.gone.add(which)

    def hold(self, root: Path, volume: Path | None = None) -> None:
        """Check a store that starts after a crash: nothing acknowledged is lost, nothing deleted comes back."""
        if not root.exists():
            assert not self.reserved, "the store is lost"
            return
        corrupt = "" if STAYS.name in self.models else CORRUPT
        check_invariants(root, corrupt, volume)
        store = StoreFixture(root, volume)
        store.onto = next(iter(store.disk.volumes), "")
        check_invariants(root, corrupt, volume)
        ledger = store.ledger
        if corrupt in ledger.blobs:
            verify_blob(store, corrupt)
        for blob in self.reserved:
            assert blob in ledger.arrivals.partials or CALLED[blob] in ledger.blobs, f"reserved and lost: {blob[:12]}"
        assert not self.here - set(ledger.blobs), "committed and lost"
        assert all(leaf_hash_file.is_verified(store.layout, blob) for blob in self.here), (
            "committed, and nothing proves it"
        )
        for model in MODELS:
            for blob, data in model.blobs.items():
                claimed_leaves(store.layout.partial(blob), data)
        assert not self.gone & {*ledger.blobs, *ledger.arrivals.partials}, "gone and come back"
        assert not self.models - set(ledger.manifests), "sealed and lost"
        assert not self.deleted & set(ledger.stored_manifests), "deleted and come back"
        metadata = MetadataFiles(store.layout, ledger)
        metadata.read()
        assert self.pinned <= ledger.uses.pinned <= self.may_be_pinned, f"pinned: {ledger.uses.pinned}"
        assert not any(store.layout.tombstones.iterdir()), "what was begun is not finished"
        for model in MODELS:
            if model.name in ledger.manifests:
                build_view(store.layout, model.sealed)  # as publishing does at startup
                assert store.holds(model), f"{model.name} has other bytes"
        # Nobody holds the leases of a dead process, whatever is left of their views.
        for lease in list(ledger.uses.leases.values()):
            assert store.end(lease)
        assert not any(store.layout.leases.iterdir()), "an unfinished lease is left"
        # The store goes on, to the same end.
        for model in (STAYS, COMES):
            store.bring_in(model)
            assert store.holds(model)
