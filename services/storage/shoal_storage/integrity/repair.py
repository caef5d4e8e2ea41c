"""Repair a corrupt blob in place: download its bad leaves only. Blocking: runs in threads.

    quarantine/<sha256>         the whole file, with bad and good leaves
    quarantine/<sha256>.have    bitmap of the good leaves, in the format of a partial blob's `have`

When the blob is downloaded again, that file becomes the data of its partial blob and the bitmap its `have`; the
fetcher resumes from there. The commit hashes the whole blob as always: if the bitmap claims too much, everything is
discarded and downloaded again.

Order of quarantining: the file moves to quarantine, durably; then the bitmap is written, with fsync. Order of taking
it back: `have` and `meta.json` into the partial blob's directory, each with fsync of its bytes; the file last, by
rename; fsync of both directories. A directory without `data` is no partial blob and is deleted at the next start. An
interruption at any step leaves the file in quarantine with its bitmap, or the partial blob, or at worst neither, and
then the whole blob is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal_common.host.private_files import FILE_MODE
from shoal_common.messages import encode
from shoal_common.names import ModelId
from shoal_common.store.bitmap import Bitmap
from shoal_storage.files.atomic_file import fsync_path, replace_file, replace_file_unsynced
from shoal_storage.integrity.blob_check import VerificationResult
from shoal_storage.store.partials import PartialMeta, delete_partial, link_partial, write_partial
from shoal_storage.store.store import Store


def record_good_leaves(store: Store, result: VerificationResult) -> int:
    """Record the good leaves of a quarantined blob; return the bytes a repair reuses, which need no new space."""
    if result.good_leaves is None:
        return 0
    replace_file(store.layout.quarantined_have(result.sha256), result.good_leaves.to_bytes())
    return repairable_bytes(store, result.sha256)


def repairable_blobs(store: Store, blobs: Iterable[str]) -> dict[str, int]:
    """Return the quarantined blobs that can be repaired by leaf, with the bytes that each repair reuses."""
    return {blob: size_bytes for blob in blobs if (size_bytes := repairable_bytes(store, blob))}


def repairable_bytes(store: Store, sha256: str) -> int:
    """Return the bytes on the disk that a repair of this blob reuses; 0 if it has to be downloaded whole."""
    try:
        status = store.layout.quarantined(sha256).lstat()
    except FileNotFoundError:
        return 0
    return min(status.st_blocks * 512, status.st_size) if _good_leaves(store, sha256, status.st_size) else 0


def _good_leaves(store: Store, sha256: str, size_bytes: int) -> Bitmap | None:
    """Return the good leaves of a quarantined file, if it has this size and a bitmap that fits."""
    paths = store.layout
    try:
        if paths.quarantined(sha256).lstat().st_size != size_bytes:
            return None
        bitmap = paths.quarantined_have(sha256).read_bytes()
    except OSError:
        return None
    good = Bitmap(size_bytes, bitmap)
    return good if bitmap == good.to_bytes() and good.have_bytes else None


def create_partial(
    store: Store,
    blob: str,
    size_bytes: int,
    models: Iterable[ModelId],
    leaves_by_model: Mapping[ModelId, int] | None = None,
) -> bool:
    """Create a missing partial blob, from the good leaves in quarantine (True) or empty (False)."""
    paths, directory = store.layout, store.layout.partial(blob)
    good = _good_leaves(store, blob, size_bytes)
    if good is None:
        write_partial(store, blob, size_bytes, models, leaves_by_model)
        return False
    store.require_volume(blob)
    if directory.exists():  # without `data`: the other files in it describe other bytes
        delete_partial(store, blob)
    directory.mkdir()
    replace_file_unsynced(directory / "have", good.to_bytes())
    replace_file_unsynced(directory / "meta.json", encode(PartialMeta(size_bytes=size_bytes, models=sorted(models))))
    fsync_path(directory.parent)
    paths.quarantined(blob).chmod(FILE_MODE)
    paths.quarantined(blob).replace(directory / "data")
    fsync_path(directory)
    paths.quarantined_have(blob).unlink(missing_ok=True)
    fsync_path(paths.quarantined(blob).parent)
    link_partial(store, blob)
    return True
