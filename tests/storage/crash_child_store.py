"""A longer life of a store with every kind of change; reports what it begins and what it has acknowledged.

Also a process of its own, which asks before each change: `python -m tests.storage.lives STORE VOLUME [function …]`
prints `at …` or `ack …` and waits for a line; the fsyncs made in the functions named are left out. VOLUME is a volume
to which all blobs go, or "".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from shoal_storage.files.metadata_files import MetadataFiles
from shoal_storage.integrity import blob_check, quarantine
from shoal_storage.integrity.repair import record_good_leaves
from shoal_storage.ledger.references import manifests_with_blob
from shoal_storage.store.commit import delete_quarantined
from shoal_storage.store.partials import delete_partial
from tests.storage.crash_child_model import COMES, LEAVES, STAYS
from tests.storage.store_fixtures import Model, StoreFixture, claimed_leaves, put, put_missing, sha256
from tests.storage.syscall_tracer import Call, seen

Acknowledge = Callable[[str, str], None]
CORRUPT = sha256(STAYS.bytes["own.bin"])


def live(root: Path, acknowledge: Acknowledge, volume: Path | None = None) -> None:
    """Models come and go, are pinned and leased, a blob is corrupted and repaired, a deleted model is started again.

    All blobs are on a volume if there is one.
    """
    store = StoreFixture(root, volume)
    store.onto = next(iter(store.disk.volumes), "")
    metadata = MetadataFiles(store.layout, store.ledger)
    bring_in(store, STAYS, acknowledge)
    metadata.pin(STAYS.name)
    acknowledge("pinned", STAYS.name)
    bring_in(store, LEAVES, acknowledge)
    lease, other = store.lease(STAYS, "one"), store.lease(LEAVES, "other")
    assert store.end(other)
    acknowledge("setting-aside", CORRUPT)
    rot(store, CORRUPT, acknowledge)
    bring_in(store, STAYS, acknowledge)  # by leaf
    store.layout.leaf_list(CORRUPT).unlink()  # as in a store from before leaf hashes existed
    rot(store, CORRUPT, acknowledge)
    assert store.end(lease)
    bring_in(store, STAYS, acknowledge)  # the whole blob
    rot(store, CORRUPT, acknowledge)
    delete_quarantined(store.disk, CORRUPT)
    acknowledge("dropped", CORRUPT)
    bring_in(store, STAYS, acknowledge)
    acknowledge("deleting", LEAVES.name)
    store.delete(LEAVES)
    acknowledge("deleted", LEAVES.name)
    bring_back_one_blob(store, acknowledge)
    for blob in store.reserve(COMES):
        acknowledge("reserved", blob)
        acknowledge("releasing", blob)
        delete_partial(store.disk, blob)
        store.ledger.arrivals.drop_partial(blob)
        acknowledge("released", blob)
    acknowledge("unpinning", STAYS.name)
    metadata.unpin(STAYS.name)
    acknowledge("unpinned", STAYS.name)


def bring_in(store: StoreFixture, model: Model, acknowledge: Acknowledge) -> None:
    """Reserve, receive, commit, seal."""
    acknowledge("reserving", model.name)
    for blob in store.reserve(model):
        acknowledge("reserved", blob)
        if claimed_leaves(store.layout.partial(blob), model.blobs[blob]):
            acknowledge("taken-back", blob)
        put_missing(store.layout, blob, model.blobs[blob])
        acknowledge("committed", store.commit(blob))
    store.seal(model)
    acknowledge("sealed", model.name)


def rot(store: StoreFixture, blob: str, acknowledge: Acknowledge) -> None:
    """Change the first leaf of a blob on disk, verify the blob and quarantine it."""
    acknowledge("setting-aside", blob)
    path = store.layout.blob(blob)
    path.chmod(0o644)
    with path.open("r+b") as f:
        f.write(b"?")
    checked = blob_check.hash_blob(store.disk, blob, lambda _: None)
    assert checked is not None and not checked.intact
    assert quarantine.quarantine_blob(
        store.disk, checked, manifests_with_blob(blob, store.ledger), store.ledger.uses.leases.values()
    )
    store.ledger.quarantine(blob)
    acknowledge("quarantined", blob)
    if record_good_leaves(store.disk, checked):
        acknowledge("kept-good", blob)


def bring_back_one_blob(store: StoreFixture, acknowledge: Acknowledge) -> None:
    """Download the first blob of a deleted model again, and nothing more of it."""
    acknowledge("reserving", LEAVES.name)
    blobs = store.reserve(LEAVES)
    for blob in blobs:
        acknowledge("reserved", blob)
    put(store.layout, blobs[0], LEAVES.blobs[blobs[0]])
    acknowledge("committed", store.commit(blobs[0]))


def main(root: Path) -> None:
    """Run the life, asking before each change and after each acknowledgement whether to go on."""

    def ask(line: str) -> None:
        print(line, flush=True)
        sys.stdin.readline()

    def before(call: Call) -> bool:
        ask(f"at {call}")
        return call.site.split(":")[1] not in left_out or call.name != "fsync"

    left_out, volume = set(sys.argv[3:]), Path(sys.argv[2]) if sys.argv[2] else None
    with seen(root.parent, before):
        live(root, lambda what, which: ask(f"ack {what} {which}"), volume)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
