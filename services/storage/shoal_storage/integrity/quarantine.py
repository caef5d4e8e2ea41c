"""Move corrupt files out of the way, and keep their good leaves."""

from __future__ import annotations

import os
from collections.abc import Iterable

from shoal_common.errors import BadName
from shoal_common.messages.manifest import Manifest
from shoal_common.names import check_blob
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.atomic_file import fsync_path
from shoal_storage.integrity.blob_check import VerificationResult
from shoal_storage.ledger.lease import ModelLease
from shoal_storage.store.commit import delete_quarantined
from shoal_storage.store.store import Store
from shoal_storage.store.views import delete_files, view_paths_of


def quarantine_blob(
    store: Store, result: VerificationResult, manifests: Iterable[Manifest], leases: Iterable[ModelLease] = ()
) -> bool:
    """Move a corrupt blob to quarantine, durably: nothing serves or loads it then. False if the file changed."""
    paths = store.layout
    path = paths.blob(result.sha256)
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not _is_checked_file(status, result):
        return False
    for directory in delete_files(view_paths_of(paths, result.sha256, manifests, leases)):
        if directory.exists():
            fsync_path(directory)
    paths.quarantined(result.sha256).parent.mkdir(exist_ok=True)
    # An older bitmap under this name does not describe these bytes.
    delete_quarantined(store, result.sha256)
    path.replace(paths.quarantined(result.sha256))
    fsync_path(paths.quarantined(result.sha256).parent)
    fsync_path(path.parent)
    leaf_hash_file.delete(paths, result.sha256)
    return True


def write_leaf_hashes(store: Store, result: VerificationResult) -> None:
    """Write the leaf hashes of an intact blob, unless its file has changed since."""
    try:
        status = store.layout.blob(result.sha256).lstat()
    except FileNotFoundError:
        return
    if _is_checked_file(status, result):
        leaf_hash_file.write(store.layout, result.sha256, result.leaf_hashes, result.stat.mtime_ns)


def _is_checked_file(status: os.stat_result, checked: VerificationResult) -> bool:
    return (status.st_ino, status.st_mtime_ns) == (checked.stat.inode, checked.stat.mtime_ns)


def quarantined_blobs(store: Store) -> set[str]:
    """Return the blobs in quarantine, in the store and its volumes; called at start."""
    return set().union(*(quarantined_on(store, volume_id) for volume_id, _ in store.layout.each_volume()))


def quarantined_on(store: Store, volume_id: str) -> set[str]:
    """Return the blobs in quarantine on one volume; delete bitmaps without a blob and temporary files."""
    quarantined, bitmaps = set(), []
    root, paths = store.layout.volume(volume_id), store.layout
    if root.quarantine.is_dir():
        for path in root.quarantine.iterdir():
            if path.name.startswith(".") and path.suffix == ".new":
                path.unlink(missing_ok=True)
            elif path.suffix == ".have":
                bitmaps.append(path)
            else:
                try:
                    quarantined.add(check_blob(path.name))
                except BadName:
                    continue
    for path in bitmaps:
        if path.stem not in quarantined:
            path.unlink(missing_ok=True)
    for blob in quarantined:
        if not paths.volume_of(blob) and not paths.blob(blob).exists() and not paths.partial(blob).exists():
            paths.blob_volumes.place(blob, volume_id)
    return quarantined
