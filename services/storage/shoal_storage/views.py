"""Views built, and taken down: links go, files that somebody else put there stay. Blocking: runs in threads."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from shoal_common.layout import Layout
from shoal_common.messages.records import Manifest

_NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


def build_view(layout: Layout, manifest: Manifest) -> None:
    """Link every file of a model under its own name: hard links, or symbolic ones; never a copy.

    What is there and is not the blob (a file somebody put there, a link to what the blob was before) is replaced.
    """
    for f in manifest.files:
        target, blob = layout.view_file(manifest, f.path), layout.blob(f.sha256)
        if target.exists() and target.samefile(blob):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            target.hardlink_to(blob)
        except OSError as e:
            if e.errno not in _NO_HARD_LINK:
                raise
            target.symlink_to(blob)


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
