"""Move corrupt files out of the way, and keep their good leaves."""

from __future__ import annotations

import os
from collections.abc import Iterable

from shoal_common.errors import BadName
from shoal_common.messages.manifest import Manifest
from shoal_common.names import check_blob
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.atomic_file import sync
from shoal_storage.integrity.blob_check import Checked
from shoal_storage.ledger.lease import Lease
from shoal_storage.store.store import Disk
from shoal_storage.store.views import places_of, unlink


def set_aside(disk: Disk, checked: Checked, manifests: Iterable[Manifest], leases: Iterable[Lease] = ()) -> bool:
    """Move a corrupt blob to quarantine, durably: nothing serves or loads it then. False if the file changed."""
    paths = disk.layout
    path = paths.blob(checked.sha256)
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not _is_checked_file(status, checked):
        return False
    for directory in unlink(places_of(paths, checked.sha256, manifests, leases)):
        if directory.exists():
            sync(directory)
    paths.set_aside(checked.sha256).parent.mkdir(exist_ok=True)
    # An older bitmap under this name does not describe these bytes.
    disk.drop_set_aside(checked.sha256)
    path.replace(paths.set_aside(checked.sha256))
    sync(paths.set_aside(checked.sha256).parent)
    sync(path.parent)
    leaf_hash_file.remove(paths, checked.sha256)
    return True


def list_leaves(disk: Disk, checked: Checked) -> None:
    """Write the leaf hashes of an intact blob, unless its file has changed since."""
    try:
        status = disk.layout.blob(checked.sha256).lstat()
    except FileNotFoundError:
        return
    if _is_checked_file(status, checked):
        leaf_hash_file.write(disk.layout, checked.sha256, checked.leaves, checked.mtime_ns)


def _is_checked_file(status: os.stat_result, checked: Checked) -> bool:
    return (status.st_ino, status.st_mtime_ns) == (checked.inode, checked.mtime_ns)


def set_aside_earlier(disk: Disk) -> set[str]:
    """Return the blobs in quarantine, in the store and its volumes; called at start."""
    return set().union(*(set_aside_in(disk, volume_id) for volume_id, _ in disk.layout.all()))


def set_aside_in(disk: Disk, volume_id: str) -> set[str]:
    """Return the blobs in quarantine on one volume; delete bitmaps without a blob and temporary files."""
    quarantined, bitmaps = set(), []
    root, paths = disk.layout.of(volume_id), disk.layout
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
        if volume_id and not paths.blob(blob).exists() and not paths.partial(blob).exists():
            paths.where.setdefault(blob, volume_id)
    return quarantined
