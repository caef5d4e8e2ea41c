"""Commit blobs, seal models and delete blobs on disk, in the orders of DESIGN §7. Blocking.

Order of a commit: data; fsync and verification in parallel; chmod; verification stamp; leaf hashes; rename; fsync of
both directories; the manifest last. `tombstones.py` has the order of a deletion.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from shoal_common.errors import Corrupt, NotFound, Unavailable
from shoal_common.host.private_files import FILE_MODE
from shoal_common.messages import encode
from shoal_common.messages.manifest import Manifest
from shoal_common.store.store_paths import StorePaths
from shoal_common.store.verification_stamp import has_stamp, write_stamp
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.atomic_file import fsync_path, make_directory, replace_file
from shoal_storage.files.blob_stat import VERIFIED_MODE, stat_blob
from shoal_storage.files.hashing import FileHashes, hash_file
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.store.partials import unlink_partial
from shoal_storage.store.store import Store
from shoal_storage.store.views import build_view


def commit_blob(store: Store, blob: str, digests: FileHashes) -> None:
    """Give verified bytes their name. After this returns, the blob survives a power cut."""
    store.require_volume(blob)
    paths = store.layout
    source, target = paths.partial(blob), paths.blob(digests.sha256)
    existing = stat_blob(paths, target)
    # A verified blob that is here stays: views link to that very file.
    if existing is None or not existing.is_verified or existing.size_bytes != digests.size_bytes:
        target = paths.blob_on(paths.volume_of(blob), digests.sha256)
        _name_blob(store, source / "data", target, digests)
        set_volume(store, digests.sha256, paths.volume_of(blob))
        fsync_path(source)
    # Also if it was here already: an earlier attempt may have failed, or been killed, just before this.
    fsync_path(target.parent)
    # Good bytes replace the corrupt ones, which have no more leaves to give.
    delete_quarantined(store, digests.sha256)
    store.delete(source)
    unlink_partial(store, blob)
    if blob != digests.sha256:
        paths.blob_volumes.place(blob, "")


def set_volume(store: Store, blob: str, volume_id: str) -> None:
    """Record that a blob is, or is to go, on a volume; "": the store. Drops its quarantined bytes elsewhere."""
    if store.layout.volume_of(blob) != volume_id:
        delete_quarantined(store, blob)
        store.layout.blob_volumes.place(blob, volume_id)


def _name_blob(store: Store, data: Path, target: Path, digests: FileHashes) -> None:
    file_stat = data.stat()
    if file_stat.st_mtime_ns != digests.mtime_ns and not has_stamp(digests.sha256, file_stat):
        raise Unavailable(f"{digests.sha256[:16]}… was modified after it was verified; try again")
    try:
        data.chmod(VERIFIED_MODE)
        write_stamp(digests.sha256, data)
        leaf_hash_file.write(store.layout, digests.sha256, digests.leaf_hashes, data.stat().st_mtime_ns)
        make_directory(target.parent, store.layout.volume_of_path(target).root)
        data.replace(target)
    except OSError:
        data.chmod(FILE_MODE)  # it is still a partial blob and may be written to
        raise


def delete_quarantined(store: Store, sha256: str) -> None:
    """Delete a blob from quarantine, durably: its bitmap must not come back beside other bytes."""
    for _, volume_paths in store.layout.each_volume():
        files = [
            p
            for p in (
                StorePaths.quarantined(volume_paths, sha256),
                StorePaths.quarantined_have(volume_paths, sha256),
            )
            if p.exists()
        ]
        for path in files:
            path.unlink(missing_ok=True)
        if files:
            fsync_path(volume_paths.quarantine)


def delete_blob(store: Store, sha256: str) -> None:
    """Delete a blob, durably, on every volume. Absent already is fine."""
    known_volume_id = store.layout.volume_of(sha256)
    for volume_id, _ in store.layout.each_volume():
        if volume_id == known_volume_id or _is_verified_in(store, volume_id, sha256):
            delete_copy(store, sha256, volume_id)
    leaf_hash_file.delete(store.layout, sha256)


def _is_verified_in(store: Store, volume_id: str, sha256: str) -> bool:
    with suppress(OSError):
        return has_stamp(sha256, store.layout.blob_on(volume_id, sha256).lstat())
    return False


def delete_copy(store: Store, sha256: str, volume_id: str) -> None:
    """Delete a blob's file on one volume, durably. Absent already is fine."""
    path = store.layout.blob_on(volume_id, sha256)
    path.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        fsync_path(path.parent)  # also if it was absent: an earlier attempt may have failed here
    with suppress(OSError):  # other blobs are in it
        path.parent.rmdir()


def seal_model(store: Store, manifest: Manifest) -> None:
    """Build the view, then write the manifest: from then on the model is present (I2)."""
    link_view(store, manifest)
    path = store.layout.manifest(manifest.model)
    make_directory(path.parent)
    replace_file(path, encode(manifest))


def link_view(store: Store, manifest: Manifest) -> None:
    """Link every file of a model into its view. Raises OSError, also when the store is missing."""
    if store.is_open and not store.is_present():
        raise FileNotFoundError(errno.ENOENT, "the store is missing", str(store.layout.root))
    build_view(store.layout, manifest)


def find_by_git_sha1(store: Store, git_sha1: str, candidates: Iterable[str]) -> str | None:
    """Return the one of these blobs (sha256) that has this git hash; None without one."""
    for sha256 in candidates:
        with suppress(FileNotFoundError):
            hashes = hash_file(store.layout.blob(sha256), with_git=True, on_progress=store.check_stopping)
            if hashes.git_sha1 == git_sha1:
                return sha256
    return None


def require_all_blobs(manifest: Manifest, ledger: Ledger) -> None:
    """Raise NotFound or Corrupt unless every file of a manifest is a blob of the right size."""
    for f in manifest.files:
        size_bytes = ledger.blob_size(f.sha256)
        if size_bytes is None:
            raise NotFound(f"{f.path} of {manifest.model} is not here: blob {f.sha256[:16]}… is missing")
        if size_bytes != f.size_bytes:
            raise Corrupt(f"{f.path} of {manifest.model} and its blob {f.sha256[:16]}… differ in size")
