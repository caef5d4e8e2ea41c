"""The store's records of library models: where their blobs are, views of symbolic links, and known hashes.

Blocking: for threads. Everything is written to the store, nothing to a library, and all of it can be rebuilt from the
library; only `libraries/verified.json`, which saves hashing, is made durable. Views are symbolic links only: a hard
link would change a file of the library.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from shoal_common.errors import BadMessage, BadName
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct, decode, encode
from shoal_common.names import ModelId
from shoal_common.store.blob_lookup import LibraryBlob
from shoal_common.store.store_paths import StorePaths, model_from_file_name
from shoal_storage.files.atomic_file import replace_file
from shoal_storage.ledger.library_model import LibraryFile, LibraryModel, VerifiedFile

log = StructuredLogger("libraries")


class _VerifiedFile(WireStruct):
    files: dict[str, VerifiedFile] = {}


def read_verified(layout: StorePaths) -> dict[str, VerifiedFile]:
    """Return the known hashes, by absolute path; nothing if the record is unreadable, and all is hashed again."""
    try:
        return decode(layout.library_hashes.read_bytes(), _VerifiedFile).files
    except FileNotFoundError:
        return {}
    except (BadMessage, OSError) as e:
        log.warning("library hashes are unreadable; hashing again", error=str(e))
        return {}


def write_verified(layout: StorePaths, verified: Mapping[str, VerifiedFile]) -> None:
    """Save the known hashes, durably. If that fails, the next start hashes again; nothing else is lost."""
    path = layout.library_hashes
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, encode(_VerifiedFile(files=dict(verified))))
    except OSError as e:
        log.warning("library hashes cannot be saved; the next start hashes again", error=e.strerror)


def record_locations(layout: StorePaths, changed: Mapping[str, LibraryFile], blobs: Collection[str]) -> None:
    """Record where the `changed` blobs are; delete the records of blobs not in `blobs`."""
    for path in layout.library_blobs.glob("*/*"):
        if path.name not in blobs:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                path.parent.rmdir()
    for sha256, file in changed.items():
        path, seen = layout.library_blob(sha256), file.stat
        data = encode(
            LibraryBlob(path=file.absolute_path, size_bytes=seen.size_bytes, mtime_ns=seen.mtime_ns, inode=seen.inode)
        )
        with suppress(FileNotFoundError):
            if path.read_bytes() == data:
                continue
        path.parent.mkdir(parents=True, exist_ok=True)
        new_path = path.with_name(f".{path.name}.new")
        new_path.write_bytes(data)
        new_path.replace(path)


def mark_offered(layout: StorePaths, model: ModelId) -> bool:
    """Mark a library model as offered, before building its view, which startup would delete. Return whether new."""
    marker = layout.library_model(model)
    is_new = not marker.exists()
    if is_new:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return is_new


def build_view(layout: StorePaths, library_model: LibraryModel) -> None:
    """Build the view of a library model."""
    manifest = library_model.manifest
    view = layout.view(manifest.model)
    targets = {
        str(layout.view_file(manifest, f.path)): library_model.files[f.path].absolute_path for f in manifest.files
    }
    if _links_below(view) != targets:
        _remove_view(layout, manifest.model)
        for link, target in targets.items():
            Path(link).parent.mkdir(parents=True, exist_ok=True)
            Path(link).symlink_to(target)


def _links_below(view: Path) -> dict[str, str]:
    """Return the target of each file in a view, "" for a file that is no symbolic link."""
    targets = {}
    for path in view.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            targets[str(path)] = str(path.readlink()) if path.is_symlink() else ""
    return targets


def unmark_offered(layout: StorePaths, model: ModelId, with_view: bool) -> None:
    """Unmark a library model; delete its view too (`with_view`) unless the store has the model itself."""
    if with_view:
        _remove_view(layout, model)
    layout.library_model(model).unlink(missing_ok=True)


def _remove_view(layout: StorePaths, model: ModelId) -> None:
    view = layout.view(model)
    trash = layout.tombstones / f"{os.urandom(6).hex()}-{view.name}"
    with suppress(FileNotFoundError):
        view.replace(trash)
        shutil.rmtree(trash)
    with suppress(OSError):  # not empty: another commit of the model
        view.parent.rmdir()


def offered_models(layout: StorePaths) -> list[ModelId]:
    """Return the library models that are marked as offered."""
    models = []
    with suppress(FileNotFoundError):
        for path in layout.library_models.iterdir():
            with suppress(BadName):
                models.append(model_from_file_name(path.name))
    return models
