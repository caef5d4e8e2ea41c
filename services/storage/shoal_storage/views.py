"""Views taken down: links go, files that somebody else put there stay. Blocking: runs in threads."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from shoal_common.layout import Layout
from shoal_common.messages.records import Manifest


def remove_view(layout: Layout, view: Path, manifest: Manifest | None) -> None:
    """Remove what a manifest names; without one, what is the name of bytes that have another name too.

    Directories that are empty then go as well.
    """
    named = {str(view / f.path) for f in manifest.files} if manifest else set()
    if not view.is_dir() or view.is_symlink():
        return
    for directory, _, files in os.walk(view, topdown=False):
        for name in files:
            path = Path(directory, name)
            if str(path) in named or _is_link(layout, path):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody's file is in it
            Path(directory).rmdir()


def unlink_from_views(
    layout: Layout, sha256: str, manifests: Iterable[Manifest], inode: int | None = None
) -> set[Path]:
    """Take a blob out of the views of these manifests: whatever stands for it there, or only this inode.

    Returns the directories that were changed.
    """
    changed: set[Path] = set()
    for manifest in manifests:
        for file in manifest.files:
            if file.sha256 == sha256:
                linked = layout.view_file(manifest, file.path)
                with suppress(FileNotFoundError):
                    if inode is None or linked.stat().st_ino == inode:
                        linked.unlink()
                changed.add(linked.parent)
    return changed


def _is_link(layout: Layout, path: Path) -> bool:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return path.readlink().is_relative_to(layout.blobs)
    return found.st_nlink > 1
