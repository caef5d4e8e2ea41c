"""Scan a store by stat: blobs, partial blobs, manifests, foreign files."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal_common.errors import BadName, ShoalError
from shoal_common.messages import decode
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_common.store.store_paths import StorePaths, model_file_name, model_from_directory, model_from_file_name
from shoal_storage.admission.manifest_check import check_manifest
from shoal_storage.files.blob_stat import blob_file_stat, entries_of, files_of, is_blob_name, list_blobs
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.ledger.entries import BlobFileStat, ForeignFiles
from shoal_storage.store.views import is_blob_path, links_to_blob

_MAX_NAMED = 5
_MAX_COUNTED = 100_000
"""Foreign files that are counted at most: somebody may have copied a whole disk here."""


class StoreScan(msgspec.Struct):
    """Contents of a store."""

    blobs: dict[str, BlobFileStat] = msgspec.field(default_factory=dict)
    """Files with a blob's name in a blob's place, by sha256. Of several copies, a verified one, preferably that
    on the volume where the ledger has the blob."""
    redundant_copies: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    """Bytes of the other verified copies, by volume id."""
    manifests: dict[ModelId, Manifest] = msgspec.field(default_factory=dict)
    """By `org/name@commit`."""
    unreadable_models: set[ModelId] = msgspec.field(default_factory=set)
    """Models whose manifest exists but cannot be read now: nothing is concluded about them."""
    unlinked_models: set[ModelId] = msgspec.field(default_factory=set)
    """Models with a view file that is not its blob, although the blob is present."""
    foreign: ForeignFiles = msgspec.field(default_factory=ForeignFiles)


def scan_store(layout: VolumePaths) -> StoreScan:
    """Scan a store and those of its volumes that are mounted.

    Raises OSError if any of it cannot be read: the rest then proves nothing.
    """
    scanner = _Scanner(layout)
    scanner.run()
    return scanner.result


def read_manifest(layout: StorePaths, path: Path) -> Manifest:
    """Read a manifest and check it like one from outside, its place included. Raises ShoalError, OSError."""
    manifest = decode(path.read_bytes(), Manifest)
    check_manifest(manifest)
    if not manifest.sealed or path != layout.manifest(manifest.model):
        raise BadName(f"it is the manifest of {manifest.model}, unsealed or misplaced")
    return manifest


def rescan(layout: VolumePaths, scan: StoreScan, blobs: Iterable[str], models: Iterable[ModelId]) -> None:
    """Update a scan by the present state of these blobs and models (`org/name@commit`). Raises OSError."""
    for sha256 in blobs:
        scan.blobs.pop(sha256, None)
        scan.redundant_copies.pop(sha256, None)
        copies = []
        for volume_id, _ in layout.each_volume():
            with suppress(FileNotFoundError, NotADirectoryError):
                status = layout.blob_on(volume_id, sha256).lstat()
                if stat.S_ISREG(status.st_mode):
                    copies.append(blob_file_stat(sha256, status, volume_id))
        if copies:
            _choose_copy(layout, scan, sha256, copies)
    for model in models:
        scan.manifests.pop(model, None)
        scan.unreadable_models.discard(model)
        scan.unlinked_models.discard(model)
        try:
            scan.manifests[model] = manifest = read_manifest(layout, layout.manifest(model))
        except (ShoalError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        except OSError:
            scan.unreadable_models.add(model)
            continue
        in_store = [f for f in manifest.files if f.sha256 in scan.blobs]
        if not all(links_to_blob(layout.view_file(manifest, f.path), layout.blob(f.sha256)) for f in in_store):
            scan.unlinked_models.add(model)


def _choose_copy(
    layout: VolumePaths, scan: StoreScan, sha256: str, copies: Iterable[BlobFileStat]
) -> list[BlobFileStat]:
    """Add a blob that is present, maybe more than once, to a scan. Returns the copies that are foreign files."""
    expected = layout.volume_of(sha256)
    chosen, *others = sorted(copies, key=lambda s: (not s.is_verified, s.volume_id != expected))
    scan.blobs[sha256] = chosen
    for other in others:
        if other.is_verified:
            scan.redundant_copies.setdefault(sha256, {})[other.volume_id] = other.size_bytes
    return [other for other in others if not other.is_verified]


class _Scanner:
    def __init__(self, layout: VolumePaths) -> None:
        self._layout = layout
        self._inodes: set[int] = set()
        self._times: set[tuple[int, int]] = set()
        """Size and mtime_ns of the blobs, which their reflinks share."""
        self._foreign_count = 0
        self._foreign_bytes = 0
        self._foreign_paths: list[str] = []
        self.result = StoreScan()

    def run(self) -> None:
        paths = self._layout
        for entry in entries_of(paths.root):
            if entry.name not in paths.top_names and not _is_temporary(entry.name):
                self._count_foreign(Path(entry.path))
        self._scan_blobs()
        self._scan_manifests()
        self._scan_views()
        for _, volume in paths.each_volume():
            for entry in (*entries_of(volume.partials), *entries_of(volume.quarantine)):
                if not is_blob_name(entry.name):
                    self._count_foreign(Path(entry.path))
        for directory in (paths.pins, paths.uses, paths.reservations, paths.shards):
            for entry in entries_of(directory):
                if not _is_temporary(entry.name) and not _is_model_name(entry.name):
                    self._count_foreign(Path(entry.path))
        self.result.foreign = ForeignFiles(
            self._foreign_count, self._foreign_bytes, tuple(sorted(self._foreign_paths))
        )

    def _scan_blobs(self) -> None:
        copies: dict[str, list[BlobFileStat]] = {}
        for volume_id, volume in self._layout.each_volume():
            for entry in entries_of(volume.blobs.parent):
                if entry.name != volume.blobs.name:
                    self._count_foreign(Path(entry.path))
            blobs = list_blobs(volume, volume_id, self._count_foreign)
            for sha256, stamp in blobs.items():
                copies.setdefault(sha256, []).append(stamp)
            if not volume_id:  # hard links and reflinks in views can share a file of the store itself only
                self._inodes.update(stamp.inode for stamp in blobs.values())
                self._times.update((stamp.size_bytes, stamp.mtime_ns) for stamp in blobs.values())
        for sha256, stamps in copies.items():
            for foreign in _choose_copy(self._layout, self.result, sha256, stamps):
                self._count_foreign(self._layout.blob_on(foreign.volume_id, sha256))

    def _scan_manifests(self) -> None:
        for directory in entries_of(self._layout.manifests):
            if not directory.is_dir(follow_symlinks=False):
                self._count_foreign(Path(directory.path))
                continue
            for entry in entries_of(Path(directory.path)):
                path = Path(entry.path)
                if _is_temporary(entry.name):
                    continue
                try:
                    manifest = read_manifest(self._layout, path)
                except (ShoalError, FileNotFoundError, IsADirectoryError):
                    self._count_foreign(path)
                except OSError:
                    self._count_foreign(path)
                    try:
                        self.result.unreadable_models.add(model_from_directory(directory.name, path.stem))
                    except BadName:
                        continue
                else:
                    self.result.manifests[manifest.model] = manifest

    def _scan_views(self) -> None:
        paths, result = self._layout, self.result
        views: dict[ModelId, set[str]] = {}
        library_models = {entry.name for entry in entries_of(paths.library_models)}
        for directory in entries_of(paths.views):
            if not directory.is_dir(follow_symlinks=False):
                self._count_foreign(Path(directory.path))
                continue
            for entry in entries_of(Path(directory.path)):
                try:
                    model = model_from_directory(directory.name, entry.name)
                except BadName:
                    self._count_foreign(Path(entry.path))
                    continue
                if model not in result.manifests and model_file_name(model) in library_models:
                    continue  # links into a library, which `libraries/service.py` maintains
                if model not in result.unreadable_models:
                    views[model] = self._scan_view(Path(entry.path), result.manifests.get(model))
        for model, manifest in result.manifests.items():
            linked = views.get(model, set())
            if any(f.path not in linked and f.sha256 in result.blobs for f in manifest.files):
                result.unlinked_models.add(model)

    def _scan_view(self, view: Path, manifest: Manifest | None) -> set[str]:
        """Return the paths in a view whose file is the blob that the manifest names."""
        expected = {f.path: f.sha256 for f in manifest.files} if manifest else {}
        by_form = {unicodedata.normalize("NFC", path): path for path in expected}
        linked: set[str] = set()
        for entry in files_of(view):
            path = entry.path[len(str(view)) + 1 :]
            if path not in expected:  # some file systems list names decomposed, however they were made
                path = by_form.get(unicodedata.normalize("NFC", path), path)
            blob = self.result.blobs.get(expected.get(path, ""))
            if entry.is_symlink():
                target = Path(entry.path).readlink()
                if blob is not None and target == self._layout.blob_on(blob.volume_id, expected[path]):
                    linked.add(path)
                elif path not in expected and not is_blob_path(target):
                    self._count_foreign(Path(entry.path))
            elif (
                blob is not None
                and not blob.volume_id
                and (entry.inode() == blob.inode or _time(entry) == (blob.size_bytes, blob.mtime_ns))
            ):
                linked.add(path)
            elif path not in expected and entry.inode() not in self._inodes and _time(entry) not in self._times:
                self._count_foreign(Path(entry.path))
        return linked

    def _count_foreign(self, path: Path) -> None:
        """Count a foreign file, or all files of a foreign directory."""
        try:
            entries: Iterator[Path] = iter([path])
            if path.is_dir() and not path.is_symlink():
                entries = (Path(e.path) for e in files_of(path))
            for file in entries:
                if self._foreign_count >= _MAX_COUNTED:
                    return
                size_bytes = file.lstat().st_size
                self._foreign_count += 1
                self._foreign_bytes += size_bytes
                if len(self._foreign_paths) < _MAX_NAMED:
                    in_store = file.is_relative_to(self._layout.root)
                    self._foreign_paths.append(str(file.relative_to(self._layout.root) if in_store else file))
        except OSError:
            return  # deleted meanwhile, or unreadable: nothing depends on it


def _time(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Return a file's size and mtime_ns."""
    status = entry.stat(follow_symlinks=False)
    return status.st_size, status.st_mtime_ns


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".new")


def _is_model_name(name: str) -> bool:
    try:
        model_from_file_name(name)
    except BadName:
        return False
    return True
