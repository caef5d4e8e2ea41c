"""Whether a path that changed shows anything that the ledger does not say. Blocking; within the guard's section.

Storage's own writes are told to it too, by the file system: there disk and ledger agree, and no scan follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from shoal_common.errors import ShoalError
from shoal_common.layout import directory_of
from shoal_common.messages.records import Manifest
from shoal_storage.decide import Ledger
from shoal_storage.scan import blob_stamp, read_manifest
from shoal_storage.store_layout import StoreLayout
from shoal_storage.views import is_blob


def any_differs(layout: StoreLayout, ledger: Ledger, paths: Iterable[Path]) -> bool:
    """Whether a scan is worth it."""
    return any(_differs(layout, ledger, path) for path in paths)


def _differs(layout: StoreLayout, ledger: Ledger, path: Path) -> bool:
    if path.name.startswith(".") and path.name.endswith(".new"):
        return False
    try:
        if path.is_relative_to(layout.holding(path).blobs.parent):
            return _blob_differs(layout, ledger, path)
        if path.is_relative_to(layout.manifests):
            return _manifest_differs(layout, ledger, path)
        if path.is_relative_to(layout.views):
            return _view_differs(layout, ledger, path)
    except OSError:
        return True
    return True


def _blob_differs(layout: StoreLayout, ledger: Ledger, path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return any(_blob_differs(layout, ledger, below) for below in path.iterdir())
    stamp, known = blob_stamp(layout, path), ledger.unproven.get(path.name)
    if stamp is None:
        # Gone, a directory of ours that has gone, or a file that is none of ours: that is somebody else's doing.
        below = str(path.relative_to(layout.root) if path.is_relative_to(layout.root) else path)
        gone = not os.path.lexists(path)
        expected = path.name in ledger.blobs or path.name in ledger.unproven
        return expected or not gone or _counted(ledger, below) or _prefix(path, ledger)
    if known is not None:
        return not stamp.same_file(known)
    return not (stamp.proven and ledger.blobs.get(path.name) == stamp.size_bytes)


def _prefix(path: Path, ledger: Ledger) -> bool:
    """Whether blobs are missed with a directory: `blobs`, `sha256`, or the first two digits of theirs."""
    if len(path.name) == 2:
        return any(b.startswith(path.name) for b in (*ledger.blobs, *ledger.unproven))
    return len(path.name) < 64 and bool(ledger.blobs or ledger.unproven)


def _counted(ledger: Ledger, below: str) -> bool:
    """Whether something unknown that was counted may have been this. Only the first ones are known by name."""
    return ledger.unknown.count > len(ledger.unknown.paths) or any(
        p == below or p.startswith(f"{below}/") for p in ledger.unknown.paths
    )


def _manifest_differs(layout: StoreLayout, ledger: Ledger, path: Path) -> bool:
    below = str(path.relative_to(layout.root))
    if path.is_dir() and not path.is_symlink():
        return any(_manifest_differs(layout, ledger, p) for p in path.iterdir() if not p.name.startswith("."))
    if not os.path.lexists(path):
        parts = path.relative_to(layout.manifests).parts
        missed = [m for m in ledger.on_disk.values() if layout.manifest(m.repo, m.commit).is_relative_to(path)]
        return bool(missed) or not parts or _counted(ledger, below)
    try:
        manifest = read_manifest(layout, path)
    except ShoalError:
        return True
    return ledger.on_disk.get(manifest.model) != manifest


def _view_differs(layout: StoreLayout, ledger: Ledger, path: Path) -> bool:
    repo, commit, *rest = (*path.relative_to(layout.views).parts, "", "")
    below = "/".join(part for part in rest if part)
    if any(_unlinked(layout, m, below) for m in _models_at(ledger, repo, commit)):
        return True
    if not os.path.lexists(path):
        return _counted(ledger, str(path.relative_to(layout.root)))
    if path.is_dir() and not path.is_symlink():
        return any(_view_differs(layout, ledger, inside) for inside in path.iterdir())
    # A link of a model that was removed by hand is no news; a file that is no link may be.
    named = any(f.path == below for m in ledger.on_disk.values() if _is_at(m, repo, commit) for f in m.files)
    return not named and path.lstat().st_nlink == 1 and not path.is_symlink()


def _models_at(ledger: Ledger, repo: str, commit: str) -> list[Manifest]:
    """The whole models whose views a place in `views/` is, or is above of."""
    return [m for m in ledger.manifests.values() if _is_at(m, repo, commit)]


def _is_at(manifest: Manifest, repo: str, commit: str) -> bool:
    return commit in ("", manifest.commit) and repo in ("", directory_of(manifest.repo))


def _unlinked(layout: StoreLayout, manifest: Manifest, below: str) -> bool:
    """Whether a file of a model's view, of those that a path in it stands for, is not its blob."""
    for f in manifest.files:
        concerned = below in ("", f.path) or f.path.startswith(f"{below}/")
        if concerned and not is_blob(layout.view_file(manifest, f.path), layout.blob(f.sha256)):
            return True
    return False
