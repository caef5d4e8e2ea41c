"""Decide whether a changed path is worth a scan. Blocking.

The file system reports storage's own writes too; there disk and ledger agree, and no scan follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from shoal_common.errors import ShoalError
from shoal_common.messages.manifest import Manifest
from shoal_common.store.store_paths import directory_of
from shoal_storage.files.blob_stat import stat_blob
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.scan.scanner import read_manifest
from shoal_storage.store.views import links_to_blob


def has_visible_change(layout: VolumePaths, ledger: Ledger, paths: Iterable[Path]) -> bool:
    """Return whether any changed path shows something that the ledger lacks."""
    return any(_differs(layout, ledger, path) for path in paths)


def _differs(layout: VolumePaths, ledger: Ledger, path: Path) -> bool:
    if path.name.startswith(".") and path.name.endswith(".new"):
        return False
    try:
        if path.is_relative_to(layout.volume_of_path(path).blobs.parent):
            return _blob_differs(layout, ledger, path)
        if path.is_relative_to(layout.manifests):
            return _manifest_differs(layout, ledger, path)
        if path.is_relative_to(layout.views):
            return _view_differs(layout, ledger, path)
    except OSError:
        return True
    return True


def _blob_differs(layout: VolumePaths, ledger: Ledger, path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return any(_blob_differs(layout, ledger, child) for child in path.iterdir())
    stamp, known = stat_blob(layout, path), ledger.unverified.get(path.name)
    if stamp is None:
        # A blob or one of our directories is gone, or a foreign file came or went: not storage's doing.
        relative = str(path.relative_to(layout.root) if path.is_relative_to(layout.root) else path)
        is_gone = not os.path.lexists(path)
        expected = path.name in ledger.blobs or path.name in ledger.unverified
        return (
            expected or not is_gone or _may_be_counted_foreign(ledger, relative) or _is_blob_directory(path, ledger)
        )
    if known is not None:
        return not stamp.same_file(known)
    return not (stamp.is_verified and ledger.blobs.get(path.name) == stamp.size_bytes)


def _is_blob_directory(path: Path, ledger: Ledger) -> bool:
    """Whether a missing directory held blobs: `blobs`, `sha256`, or one named for their first two digits."""
    if len(path.name) == 2:
        return any(b.startswith(path.name) for b in (*ledger.blobs, *ledger.unverified))
    return len(path.name) < 64 and bool(ledger.blobs or ledger.unverified)


def _may_be_counted_foreign(ledger: Ledger, relative: str) -> bool:
    """Whether a counted foreign file may have been this path. Only the first few are recorded by name."""
    return ledger.foreign.count > len(ledger.foreign.paths) or any(
        p == relative or p.startswith(f"{relative}/") for p in ledger.foreign.paths
    )


def _manifest_differs(layout: VolumePaths, ledger: Ledger, path: Path) -> bool:
    relative = str(path.relative_to(layout.root))
    if path.is_dir() and not path.is_symlink():
        return any(_manifest_differs(layout, ledger, p) for p in path.iterdir() if not p.name.startswith("."))
    if not os.path.lexists(path):
        parts = path.relative_to(layout.manifests).parts
        missing = [m for m in ledger.stored_manifests.values() if layout.manifest(m.model).is_relative_to(path)]
        return bool(missing) or not parts or _may_be_counted_foreign(ledger, relative)
    try:
        manifest = read_manifest(layout, path)
    except ShoalError:
        return True
    return ledger.stored_manifests.get(manifest.model) != manifest


def _view_differs(layout: VolumePaths, ledger: Ledger, path: Path) -> bool:
    repo, commit, *rest = (*path.relative_to(layout.views).parts, "", "")
    file_path = "/".join(part for part in rest if part)
    if any(_is_unlinked(layout, m, file_path) for m in _complete_models(ledger, repo, commit)):
        return True
    if not os.path.lexists(path):
        return _may_be_counted_foreign(ledger, str(path.relative_to(layout.root)))
    if path.is_dir() and not path.is_symlink():
        return any(_view_differs(layout, ledger, child) for child in path.iterdir())
    # A link left by a model that was removed by hand does not matter; a file of its own may.
    named = any(
        f.path == file_path for m in ledger.stored_manifests.values() if _matches(m, repo, commit) for f in m.files
    )
    return not named and path.lstat().st_nlink == 1 and not path.is_symlink()


def _complete_models(ledger: Ledger, repo: str, commit: str) -> list[Manifest]:
    """Return the complete models with a view in the directory `views/<repo>/<commit>`; "" stands for all."""
    return [m for m in ledger.manifests.values() if _matches(m, repo, commit)]


def _matches(manifest: Manifest, repo: str, commit: str) -> bool:
    return commit in ("", manifest.commit) and repo in ("", directory_of(manifest.repo))


def _is_unlinked(layout: VolumePaths, manifest: Manifest, file_path: str) -> bool:
    """Whether a file at or below a path of a model's view ("" for the view itself) is not its blob."""
    for f in manifest.files:
        affected = file_path in ("", f.path) or f.path.startswith(f"{file_path}/")
        if affected and not links_to_blob(layout.view_file(manifest, f.path), layout.blob(f.sha256)):
            return True
    return False
