"""Whether a path that changed shows anything that the ledger does not say. Blocking; within the guard's section.

Storage's own writes are told to it too, by the file system: there disk and ledger agree, and no scan follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from shoal_common.errors import BadName, ShoalError
from shoal_common.layout import Layout
from shoal_common.messages.records import Manifest
from shoal_storage.decide import Ledger
from shoal_storage.scan import blob_stamp, model_at, read_manifest


def any_differs(layout: Layout, ledger: Ledger, paths: Iterable[Path]) -> bool:
    """Whether a scan is worth it."""
    return any(_differs(layout, ledger, path) for path in paths)


def _differs(layout: Layout, ledger: Ledger, path: Path) -> bool:
    if path.name.startswith(".") and path.name.endswith(".new"):
        return False
    try:
        if path.is_relative_to(layout.blobs.parent):
            return _blob_differs(layout, ledger, path)
        if path.is_relative_to(layout.manifests):
            return _manifest_differs(layout, ledger, path)
        if path.is_relative_to(layout.views):
            return _view_differs(layout, ledger, path)
    except OSError:
        return True
    return True


def _blob_differs(layout: Layout, ledger: Ledger, path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return any(_blob_differs(layout, ledger, below) for below in path.iterdir())
    stamp, known = blob_stamp(layout, path), ledger.unproven.get(path.name)
    if stamp is None:
        # Gone, a directory of ours that has gone, or a file that is none of ours: that is somebody else's doing.
        below = str(path.relative_to(layout.root))
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


def _manifest_differs(layout: Layout, ledger: Ledger, path: Path) -> bool:
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


def _view_differs(layout: Layout, ledger: Ledger, path: Path) -> bool:
    parts = path.relative_to(layout.views).parts
    for manifest in ledger.manifests.values():
        if _together(layout.view(manifest.repo, manifest.commit), path) and _unlinked(layout, manifest, path):
            return True
    if not os.path.lexists(path):
        return _counted(ledger, str(path.relative_to(layout.root)))
    if path.is_dir() and not path.is_symlink():
        return any(_view_differs(layout, ledger, below) for below in path.iterdir())
    try:
        named = ledger.on_disk.get(model_at(*parts[:2])) if parts[2:] else None
    except BadName:
        return True
    # A link of a model that was removed by hand is no news; a file that is no link may be.
    is_named = named is not None and "/".join(parts[2:]) in {f.path for f in named.files}
    return not is_named and path.lstat().st_nlink == 1 and not path.is_symlink()


def _together(view: Path, path: Path) -> bool:
    return path.is_relative_to(view) or view.is_relative_to(path)


def _unlinked(layout: Layout, manifest: Manifest, path: Path) -> bool:
    """Whether a file of a model's view, of those that a path stands for, is not its blob."""
    for f in manifest.files:
        linked = layout.view_file(manifest, f.path)
        if linked.is_relative_to(path):
            try:
                if not linked.samefile(layout.blob(f.sha256)):
                    return True
            except FileNotFoundError:
                return True
    return False
