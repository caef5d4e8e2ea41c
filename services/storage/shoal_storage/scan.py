"""What a store holds, by names and stats alone. Blocking: runs in threads; changes nothing.

What the layout names is seen; every other file is unknown, counted and left alone: strange names, files out of their
place, manifests that cannot be read, files in views that no manifest names. Temporary files of our own (`.….new`) and
what is inside partials and tombs are neither.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from shoal_common.errors import BadName, ShoalError
from shoal_common.layout import Layout, model_of
from shoal_common.messages import decode
from shoal_common.messages.records import Manifest
from shoal_common.names import check_blob
from shoal_common.proof import proven
from shoal_storage.decide import Stamp, Unknown, check_manifest
from shoal_storage.store_layout import StoreLayout
from shoal_storage.views import names_a_blob

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAMED_AT_MOST = 5
_WALKED_AT_MOST = 100_000
"""Unknown files that are counted; a person may have put a whole disk of them here."""


class Seen(msgspec.Struct):
    """What was seen in a store."""

    blobs: dict[str, Stamp] = msgspec.field(default_factory=dict)
    """Files with a blob's name in a blob's place, by sha256; of several a proven one, that where storage knows the
    blob to be if that is."""
    doubles: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)
    """Bytes, by root, of the others of them that are proven."""
    manifests: dict[str, Manifest] = msgspec.field(default_factory=dict)
    """By `org/name@commit`."""
    unreadable: set[str] = msgspec.field(default_factory=set)
    """Models whose manifest is there and cannot be read now: nothing is known of it."""
    unlinked: set[str] = msgspec.field(default_factory=set)
    """Models of whose files, in the view, some are not their blobs though these are there."""
    unknown: Unknown = msgspec.field(default_factory=Unknown)


def scan(layout: StoreLayout) -> Seen:
    """Look at all of a store and of those of its further roots that are there.

    Raises OSError when a part of it cannot be read: then nothing follows from the rest.
    """
    scanner = _Scanner(layout)
    scanner.look()
    return scanner.seen


def stamp_of(sha256: str, found: os.stat_result, further: str = "") -> Stamp:
    """A blob's file as its stat tells it apart, in a further root or in the store."""
    return Stamp(
        size_bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
        inode=found.st_ino,
        proven=proven(sha256, found),
        further=further,
    )


def blob_stamp(layout: StoreLayout, path: Path) -> Stamp | None:
    """The stamp of a file that is a blob by name, place and kind; None for any other, and where none is."""
    try:
        if not _SHA256.fullmatch(path.name) or path != layout.blob(path.name):
            return None
        found = path.lstat()
    except OSError:
        return None
    further = layout.where.get(path.name, "")
    return stamp_of(path.name, found, further) if stat.S_ISREG(found.st_mode) else None


def blobs_in(layout: Layout, further: str, strange: Callable[[Path], None] = lambda _: None) -> dict[str, Stamp]:
    """The files of a root that have a blob's name, place and kind; every other one is given to `strange`."""
    seen: dict[str, Stamp] = {}
    for directory in _entries(layout.blobs):
        if not directory.is_dir(follow_symlinks=False):
            strange(Path(directory.path))
            continue
        for entry in _entries(Path(directory.path)):
            if _SHA256.fullmatch(entry.name) and entry.name[:2] == directory.name:
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(found.st_mode):
                    seen[entry.name] = stamp_of(entry.name, found, further)
                    continue
            strange(Path(entry.path))
    return seen


def read_manifest(layout: Layout, path: Path) -> Manifest:
    """A manifest where it belongs, checked as one from outside. Raises ShoalError, OSError."""
    manifest = decode(path.read_bytes(), Manifest)
    check_manifest(manifest)
    if not manifest.sealed or path != layout.manifest(manifest.repo, manifest.commit):
        raise BadName(f"it is the manifest of {manifest.model}, unsealed or out of its place")
    return manifest


class _Scanner:
    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout
        self._inodes: set[int] = set()
        self._times: set[tuple[int, int]] = set()
        """Size and mtime_ns of the blobs: what reflinks of them have too."""
        self._strange = 0
        self._strange_bytes = 0
        self._first: list[str] = []
        self.seen = Seen()

    def look(self) -> None:
        lay = self._layout
        own = lay.top_names
        for entry in _entries(lay.root):
            if entry.name not in own and not _is_temporary(entry.name):
                self._unknown(Path(entry.path))
        self._look_at_blobs()
        self._look_at_manifests()
        self._look_at_views()
        for _, root in lay.all():
            for entry in (*_entries(root.partials), *_entries(root.quarantine)):
                if not _is_blob_name(entry.name):
                    self._unknown(Path(entry.path))
        for directory in (lay.pins, lay.uses, lay.promises, lay.parts):
            for entry in _entries(directory):
                if not _is_temporary(entry.name) and not _is_model_name(entry.name):
                    self._unknown(Path(entry.path))
        self.seen.unknown = Unknown(self._strange, self._strange_bytes, tuple(sorted(self._first)))

    def _look_at_blobs(self) -> None:
        places: dict[str, list[Stamp]] = {}
        for further, root in self._layout.all():
            for entry in _entries(root.blobs.parent):
                if entry.name != root.blobs.name:
                    self._unknown(Path(entry.path))
            found = blobs_in(root, further, self._unknown)
            for sha256, stamp in found.items():
                places.setdefault(sha256, []).append(stamp)
            if not further:  # files of views can be those of the store only
                self._inodes.update(stamp.inode for stamp in found.values())
                self._times.update((stamp.size_bytes, stamp.mtime_ns) for stamp in found.values())
        for sha256, stamps in places.items():
            known = self._layout.where.get(sha256, "")
            chosen, *others = sorted(stamps, key=lambda s: (not s.proven, s.further != known))
            self.seen.blobs[sha256] = chosen
            for other in others:
                if other.proven:
                    self.seen.doubles.setdefault(sha256, {})[other.further] = other.size_bytes
                else:
                    self._unknown(self._layout.blob_in(other.further, sha256))

    def _look_at_manifests(self) -> None:
        for directory in _entries(self._layout.manifests):
            if not directory.is_dir(follow_symlinks=False):
                self._unknown(Path(directory.path))
                continue
            for entry in _entries(Path(directory.path)):
                path = Path(entry.path)
                if _is_temporary(entry.name):
                    continue
                try:
                    manifest = read_manifest(self._layout, path)
                except (ShoalError, FileNotFoundError, IsADirectoryError):
                    self._unknown(path)
                except OSError:
                    self._unknown(path)
                    try:
                        self.seen.unreadable.add(model_of(directory.name, path.stem))
                    except BadName:
                        continue
                else:
                    self.seen.manifests[manifest.model] = manifest

    def _look_at_views(self) -> None:
        lay, seen = self._layout, self.seen
        views: dict[str, set[str]] = {}
        adopted = {entry.name for entry in _entries(lay.adopted_models)}
        for directory in _entries(lay.views):
            if not directory.is_dir(follow_symlinks=False):
                self._unknown(Path(directory.path))
                continue
            for entry in _entries(Path(directory.path)):
                try:
                    model = model_of(directory.name, entry.name)
                except BadName:
                    self._unknown(Path(entry.path))
                    continue
                if model not in seen.manifests and f"{directory.name}@{entry.name}" in adopted:
                    continue  # links into a read-only root, which `adoption.py` looks after
                if model not in seen.unreadable:
                    views[model] = self._look_at_view(Path(entry.path), seen.manifests.get(model))
        for model, manifest in seen.manifests.items():
            linked = views.get(model, set())
            if any(f.path not in linked and f.sha256 in seen.blobs for f in manifest.files):
                seen.unlinked.add(model)

    def _look_at_view(self, view: Path, manifest: Manifest | None) -> set[str]:
        """The paths of a view that are the blobs they should be."""
        wanted = {f.path: f.sha256 for f in manifest.files} if manifest else {}
        linked: set[str] = set()
        for entry in _files(view):
            path = entry.path[len(str(view)) + 1 :]
            blob = self.seen.blobs.get(wanted.get(path, ""))
            if entry.is_symlink():
                points_to = Path(entry.path).readlink()
                if blob is not None and points_to == self._layout.blob_in(blob.further, wanted[path]):
                    linked.add(path)
                elif path not in wanted and not names_a_blob(points_to):
                    self._unknown(Path(entry.path))
            elif (
                blob is not None
                and not blob.further
                and (entry.inode() == blob.inode or _time(entry) == (blob.size_bytes, blob.mtime_ns))
            ):
                linked.add(path)
            elif path not in wanted and entry.inode() not in self._inodes and _time(entry) not in self._times:
                self._unknown(Path(entry.path))
        return linked

    def _unknown(self, path: Path) -> None:
        """Count a file that is none of ours, or all files of a directory."""
        try:
            entries: Iterator[Path] = iter([path])
            if path.is_dir() and not path.is_symlink():
                entries = (Path(e.path) for e in _files(path))
            for file in entries:
                if self._strange >= _WALKED_AT_MOST:
                    return
                size_bytes = file.lstat().st_size
                self._strange += 1
                self._strange_bytes += size_bytes
                if len(self._first) < _NAMED_AT_MOST:
                    below = file.is_relative_to(self._layout.root)
                    self._first.append(str(file.relative_to(self._layout.root) if below else file))
        except OSError:
            return  # it has gone, or cannot be read: nobody counts on it


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    """What a directory holds, in the order of names; nothing when it is not there. Raises OSError."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda e: e.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from entries


def _files(directory: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below a directory that is not a directory. A plain file given in its place has none."""
    for entry in _entries(directory):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield entry


def _time(entry: os.DirEntry[str]) -> tuple[int, int]:
    """A file's size and mtime_ns."""
    found = entry.stat(follow_symlinks=False)
    return found.st_size, found.st_mtime_ns


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".new")


def _is_blob_name(name: str) -> bool:
    try:
        check_blob(name)
    except BadName:
        return False
    return True


def _is_model_name(name: str) -> bool:
    directory, _, commit = name.rpartition("@")
    try:
        model_of(directory, commit)
    except BadName:
        return False
    return True
