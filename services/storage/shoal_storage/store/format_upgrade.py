"""A store of format 1 becomes one of format 2: files about a model no longer have capitals in their names. Blocking.

Every step is one rename, and a step that is done is not found again: after a kill or a power cut the next start goes
on. `VERSION` is written last, when the renames are durable.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shoal_common.errors import BadName, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages import decode
from shoal_common.messages.manifest import Manifest
from shoal_common.names import repo_of
from shoal_common.store.store_paths import FORMAT_VERSION, directory_of, model_file_name, model_from_old_file_name
from shoal_storage.files.atomic_file import fsync_path, make_directory, replace_file
from shoal_storage.files.volume_paths import VolumePaths

log = StructuredLogger("disk")

_TOMBSTONE = ".json"
_ANY_COMMIT = "0" * 40


def upgrade_format(layout: VolumePaths) -> None:
    """Rename what has another name in format 2, durably, then write the version. Raises OSError."""
    count = sum(_rename_directories(directory) for directory in (layout.manifests, layout.views))
    count += _place_manifests(layout)
    for directory in (layout.pins, layout.uses, layout.reservations, layout.shards, layout.library_models):
        count += _rename_files(directory)
    count += _rename_files(layout.tombstones, _TOMBSTONE)
    replace_file(layout.version, FORMAT_VERSION.encode())
    log.info("store upgraded", format=FORMAT_VERSION, renamed=count)


def _rename_directories(parent: Path) -> int:
    count = 0
    for directory in _entries(parent):
        with suppress(BadName):
            model = model_from_old_file_name(f"{directory.name}@{_ANY_COMMIT}")
            count += _rename(directory, parent / directory_of(repo_of(model)))
    return count


def _rename_files(parent: Path, suffix: str = "") -> int:
    count = 0
    for file in _entries(parent):
        with suppress(BadName):
            model = model_from_old_file_name(file.name.removesuffix(suffix))
            count += _rename(file, parent / f"{model_file_name(model)}{suffix}")
    if count:
        fsync_path(parent)
    return count


def _place_manifests(layout: VolumePaths) -> int:
    """Move each manifest to its own model's directory: where case is ignored, two models had one."""
    count = 0
    for directory in _entries(layout.manifests):
        for file in _entries(directory) if directory.is_dir() and not directory.is_symlink() else ():
            with suppress(ShoalError, OSError):
                place = layout.manifest(decode(file.read_bytes(), Manifest).model)
                if place != file and place.name == file.name and not place.exists():
                    make_directory(place.parent)
                    count += _rename(file, place)
                    fsync_path(place.parent)
        if directory.is_dir():
            fsync_path(directory)
    fsync_path(layout.manifests)
    fsync_path(layout.views)
    return count


def _rename(path: Path, new_path: Path) -> int:
    """Return how many were renamed, 0 or 1. Nothing is replaced: what has the new name already stays."""
    if path == new_path:
        return 0
    if new_path.exists():
        log.warning("not renamed: its new name is taken", path=path, name=new_path.name)
        return 0
    path.rename(new_path)
    return 1


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
