"""Startup: finishes what a crash interrupted, and reads what the disk holds, by stat alone. Blocking."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_common.errors import BadInput, BadName, ShoalError
from shoal_common.host.private_files import FILE_MODE
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId, check_blob
from shoal_common.store import leaf_set
from shoal_common.store.blob_lookup import read_volumes
from shoal_common.store.store_paths import StorePaths, model_from_directory
from shoal_common.store.verification_stamp import write_stamp
from shoal_storage import shards
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.blob_stat import list_blobs
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.integrity.quarantine import quarantined_on
from shoal_storage.ledger.entries import BlobFileStat, PartialBlobInfo
from shoal_storage.ledger.lease import ModelLease
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import leftover_blobs
from shoal_storage.scan.diff import is_trusted
from shoal_storage.scan.scanner import scan_store
from shoal_storage.store.commit import delete_blob
from shoal_storage.store.partials import PartialMeta, delete_partial, link_partial, refresh_partial
from shoal_storage.store.store import Store
from shoal_storage.store.tombstones import read_tombstone
from shoal_storage.store.views import delete_view
from shoal_storage.store.volume import Volume

log = StructuredLogger("disk")


def recover_store(store: Store, leases: Mapping[str, ModelLease] | None = None) -> Ledger:
    """Finish what a crash interrupted, and return what the disk holds, by stat alone.

    Blobs that `leases` need stay in any case. Foreign files are left alone and counted.
    """
    paths = store.layout
    for link in [p for p in paths.partials.iterdir() if p.is_symlink()]:
        link.unlink(missing_ok=True)  # those of present volumes are made again
    for unfinished in (*paths.root.glob(".*.new"), *paths.manifests.glob("*/.*.new")):
        unfinished.unlink(missing_ok=True)
    tombstones = dict(_read_tombstones(paths))
    deleted = {m.model: m for m in tombstones.values()}
    ledger = _read_store(store)
    for lease in (leases or {}).values():
        ledger.uses.add_lease(lease)
    shards.read(store, ledger)
    for manifest in deleted.values():
        with _log_and_continue(manifest.model, ledger, manifest):
            leftover_path = leftover_blobs(manifest, ledger)
            try:
                for sha256 in leftover_path:
                    delete_blob(store, sha256)
            finally:
                for sha256 in store.missing_files(leftover_path):
                    ledger.drop_blob(sha256)
    times: set[tuple[int, int]] | None = None
    for view in paths.views.glob("*/*"):
        # Of a model whose deletion or sealing was interrupted. Its links would keep blobs on the disk.
        with suppress(BadName):
            model = model_from_directory(view.parent.name, view.name)
            if not paths.manifest(model).exists() and not paths.library_model(model).exists():
                times = _times_of(paths, ledger.blobs) if times is None else times
                with _log_and_continue(model, ledger, deleted.get(model)):
                    delete_view(view, deleted.get(model), times)
    for tombstone in paths.tombstones.iterdir():
        left = tombstones.get(tombstone)
        if left is None or left.model not in ledger.deleting:
            with _log_and_continue(left.model if left else tombstone.name, ledger, left):
                store.delete(tombstone)
    if {identity for identity, _ in read_volumes(paths)} <= store.volumes.keys():
        leaf_hash_file.delete_orphans(paths, ledger.blobs)  # the blobs of a missing volume are unknown
    return ledger


def read_blobs(volume: Volume) -> dict[str, BlobFileStat]:
    """Return the blobs of a volume before it is attached, by stat alone. Deletes what a crash left of deletions."""
    paths = volume.layout
    for unfinished in paths.root.glob(".*.new"):
        unfinished.unlink(missing_ok=True)
    for tombstone in paths.tombstones.iterdir():
        if tombstone.is_dir() and not tombstone.is_symlink():
            shutil.rmtree(tombstone)
        else:
            tombstone.unlink(missing_ok=True)
    return list_blobs(paths, volume.id)


def attach_volume(store: Store, ledger: Ledger, volume_id: str, blobs: Mapping[str, BlobFileStat]) -> None:
    """Add the contents of a volume that is present, at start or again, to the ledger; `blobs` as `read_blobs` has it.

    Blobs that the ledger has elsewhere stay there. What a crash left on the volume is finished or deleted.
    """
    volume_paths = store.layout.volume(volume_id)
    for sha256, stamp in blobs.items():
        if sha256 in ledger.blobs:
            if stamp.is_verified:
                ledger.add_copy(sha256, volume_id, stamp.size_bytes)
        elif sha256 not in ledger.unverified and (stamp.is_verified or sha256 not in ledger.arrivals.partials):
            if sha256 in ledger.arrivals.partials:  # the whole blob is here: none of it has to arrive
                delete_partial(store, sha256)
                ledger.arrivals.drop_partial(sha256)
            store.layout.blob_volumes.place(sha256, volume_id)
            _add_blob(store, ledger, sha256, stamp)
    for directory in volume_paths.partials.iterdir():
        name, known_volume = directory.name, ledger.volume_by_blob.get(directory.name)
        if name in ledger.arrivals.partials or (name in ledger.blobs and known_volume != volume_id):
            store.delete(directory)  # it arrives, or is present, elsewhere
            continue
        store.layout.blob_volumes.place(name, volume_id)
        if _read_partial(store, directory, ledger):
            link_partial(store, name)
        elif known_volume is None:
            store.layout.blob_volumes.place(name, "")
    ledger.add_quarantined(quarantined_on(store, volume_id))


def detach_volume(store: Store, ledger: Ledger, volume_id: str) -> list[ModelId]:
    """Drop a missing volume's contents from the ledger. Returns the models (`org/name@commit`) now incomplete."""
    for blob in ledger.arrivals.partials:
        if ledger.volume_by_blob.get(blob) == volume_id:
            store.layout.partial_link(blob).unlink(missing_ok=True)
    incomplete = ledger.detach_volume(volume_id)
    store.detach_volume(volume_id)
    return incomplete


def _add_blob(store: Store, ledger: Ledger, sha256: str, stamp: BlobFileStat) -> None:
    if not is_trusted(stamp, has_leaf_hash_file=leaf_hash_file.is_verified(store.layout, sha256)):
        ledger.add_unverified(sha256, stamp)
        return
    ledger.add_blob(sha256, stamp.size_bytes)
    if not stamp.is_verified:
        write_stamp(sha256, store.layout.blob(sha256))
        leaf_hash_file.copy_mtime(store.layout, sha256)


def _times_of(layout: VolumePaths, blobs: Iterable[str]) -> set[tuple[int, int]]:
    """Return the size and mtime_ns of the store's blobs: their reflinks have the same."""
    stats = (layout.blob(b).lstat() for b in blobs if not layout.volume_of(b))
    return {(blob_stat.st_size, blob_stat.st_mtime_ns) for blob_stat in stats}


@contextmanager
def _log_and_continue(model: str, ledger: Ledger, manifest: Manifest | None) -> Iterator[None]:
    """Log what the disk refuses to delete, so that the start goes on; the next start retries."""
    try:
        yield
    except OSError as e:
        log.warning("cannot delete the rest of a deleted model", model=model, reason=str(e))
        if manifest is not None:
            ledger.add_deletion(manifest)


def _read_tombstones(layout: StorePaths) -> Iterator[tuple[Path, Manifest]]:
    for tombstone in layout.tombstones.glob("*.json"):
        manifest = read_tombstone(tombstone)
        if manifest is not None:
            yield tombstone, manifest


def _read_store(store: Store) -> Ledger:
    scanned = scan_store(store.layout)
    ledger = Ledger(store.layout.blob_volumes)
    ledger.set_foreign(scanned.foreign)
    for sha256, stamp in scanned.blobs.items():
        if not stamp.volume_id:
            _add_blob(store, ledger, sha256, stamp)
    for directory in store.layout.partials.iterdir():
        _read_partial(store, directory, ledger)
    for volume in list(store.volumes.values()):
        attach_volume(store, ledger, volume.id, read_blobs(volume))
    for manifest in scanned.manifests.values():
        ledger.add_manifest(manifest)
    ledger.mark_complete()
    for model in ledger.incomplete:
        log.warning("model incomplete; not published", model=model)
    if scanned.foreign.count:
        log.warning(
            "foreign files in the store; left alone",
            count=scanned.foreign.count,
            size_bytes=scanned.foreign.size_bytes,
            first=",".join(scanned.foreign.paths),
        )
    return ledger


def _read_partial(store: Store, directory: Path, ledger: Ledger) -> bool:
    """Add a partial blob to the ledger, or delete it if it is none. Returns whether it was added."""
    try:
        blob = check_blob(directory.name)
        meta = decode((directory / "meta.json").read_bytes(), PartialMeta)
        # A commit that was interrupted before its rename made it read-only.
        (directory / "data").chmod(FILE_MODE)
    except BadName:
        return False
    except (ShoalError, FileNotFoundError, NotADirectoryError):
        # Its reservation was never acknowledged, or its data is already a blob.
        log.info("unfinished partial blob deleted", path=directory)
        store.delete(directory)
        return False
    if ledger.blobs.get(blob) == meta.size_bytes:
        store.delete(directory)
        return False
    try:
        leaves = {m: leaf_set.from_ranges(ranges, meta.size_bytes) for m, ranges in meta.leaves.items()}
    except BadInput:
        leaves = {}  # all of it, then: never too little
    partial = PartialBlobInfo(meta.size_bytes, models=frozenset(meta.models), leaves_by_model=leaves)
    ledger.arrivals.add_partial(blob, partial)
    refresh_partial(store, blob, ledger)
    return True
