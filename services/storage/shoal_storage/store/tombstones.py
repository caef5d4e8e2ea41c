"""Delete a model in two steps that a crash may interrupt, in the order of DESIGN §7. Blocking.

The manifest first, into tombs/, then view and blobs, then the manifest's tombstone. A start that finds a tombstone
finishes that deletion (`startup.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from shoal_common.errors import ShoalError
from shoal_common.messages import decode
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_storage.files.atomic_file import fsync_path
from shoal_storage.store.commit import delete_blob
from shoal_storage.store.store import Store
from shoal_storage.store.views import delete_view


def begin_delete(store: Store, model: ModelId) -> None:
    """Move a model's manifest into tombs/: the model is gone, and `finish_delete` deletes the rest of it.

    Raises OSError, or Unavailable if the store is missing; then nothing has changed. Absent already is fine.
    """
    store.require_present()
    with suppress(FileNotFoundError):
        store.layout.manifest(model).replace(store.layout.tombstone(model))


def finish_delete(store: Store, model: ModelId, blobs: Iterable[str]) -> None:
    """Delete the rest of a model without a manifest, and the blobs that only it needs.

    Absent already is fine. After an OSError its tombstone remains; call this again.
    """
    paths = store.layout
    path, view, tombstone = paths.manifest(model), paths.view(model), paths.tombstone(model)
    # Also if it was absent: an earlier attempt may have failed here.
    fsync_path(store.layout.tombstones)
    with suppress(FileNotFoundError):
        fsync_path(path.parent)
    delete_view(view, read_tombstone(tombstone))
    for empty in (path.parent, view.parent):
        with suppress(OSError):  # another commit of the model is in it
            empty.rmdir()
    for sha256 in blobs:
        delete_blob(store, sha256)
    # Durably too: a tombstone that came back would take newly fetched blobs with it.
    tombstone.unlink(missing_ok=True)
    fsync_path(store.layout.tombstones)


def read_tombstone(tombstone: Path) -> Manifest | None:
    """Return the manifest in a tombstone; None if it cannot be read."""
    with suppress(ShoalError, OSError):
        return decode(tombstone.read_bytes(), Manifest)
    return None
