"""Views: a model's files under their own names, each a reflink, else a hard link, else a symbolic link. Blocking.

Never a copy. Link counts are no reference counts: a blob whose name was unlinked keeps its bytes on disk while a
reflink or a hard link of it exists. So whoever deletes a blob also deletes it from the views, before or with it.
Foreign files in a view stay.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from shoal_common.messages.manifest import Manifest
from shoal_common.store.blob_lookup import find_blob
from shoal_common.store.store_paths import StorePaths, view_file_path
from shoal_storage.ledger.lease import ModelLease

_MODE = 0o444
_FICLONE = getattr(fcntl, "FICLONE", 0x40049409)  # in the standard library from Python 3.12 on
_NO_REFLINK = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV, errno.EINVAL, errno.ENOTTY)
_NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


def build_view(layout: StorePaths, manifest: Manifest) -> None:
    """Build or repair a model's public view."""
    link_files(layout, {f.path: f.sha256 for f in manifest.files}, layout.view(manifest.model))


def link_files(layout: StorePaths, files: Mapping[str, str], view: Path, arriving: Container[str] = ()) -> None:
    """Link blobs (sha256) under a model's file paths; of those in `arriving`, the partial blobs. Raises OSError.

    An existing file that is not the blob (a foreign file, a link to what the blob was before) is replaced.
    """
    methods = list(_METHODS)
    for path, sha256 in files.items():
        target, blob = view_file_path(view, path), _file_of(layout, sha256, sha256 in arriving)
        if links_to_blob(target, blob):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if blob.is_relative_to(layout.blobs) or blob.is_relative_to(layout.partials):
            _link(blob, target, methods)
        else:
            _symlink(blob, target)  # a hard link would change a file of the library


def _file_of(layout: StorePaths, sha256: str, arriving: bool) -> Path:
    data = layout.partial(sha256) / "data"
    return data if arriving and data.is_file() else find_blob(layout, sha256)


def links_to_blob(target: Path, blob: Path) -> bool:
    """Whether a view's file is the blob: the same file, a link to it, or an unmodified reflink of it."""
    try:
        blob_stat = blob.stat()
        file_stat = target.lstat()
        if stat.S_ISLNK(file_stat.st_mode):
            return target.samefile(blob)
    except FileNotFoundError:
        return False
    same_file = (file_stat.st_dev, file_stat.st_ino) == (blob_stat.st_dev, blob_stat.st_ino)
    return same_file or (
        stat.S_ISREG(file_stat.st_mode)
        and (file_stat.st_size, file_stat.st_mtime_ns) == (blob_stat.st_size, blob_stat.st_mtime_ns)
    )


def delete_view(view: Path, manifest: Manifest | None, times: Container[tuple[int, int]] = ()) -> None:
    """Delete the files that a manifest names; without a manifest, those that are links or reflinks of blobs.

    `times` has the size and mtime_ns of every blob that may have reflinks. Directories that become empty are deleted.
    """
    named_links = {str(view / f.path) for f in manifest.files} if manifest else set()
    if not view.is_dir() or view.is_symlink():
        return
    for directory, _, files in os.walk(view, topdown=False):
        for name in files:
            path = Path(directory, name)
            if str(path) in named_links or _is_link(path, times):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # a foreign file is in it
            Path(directory).rmdir()


def _is_link(path: Path, times: Container[tuple[int, int]]) -> bool:
    file_stat = path.lstat()
    if stat.S_ISLNK(file_stat.st_mode):
        return is_blob_path(path.readlink())
    return file_stat.st_nlink > 1 or (file_stat.st_size, file_stat.st_mtime_ns) in times


def is_blob_path(path: Path) -> bool:
    """Whether a path is a blob's path, on any volume."""
    *_, blobs, kind, start, sha256 = ("", "", "", "", *path.parts)
    return (blobs, kind) == ("blobs", "sha256") and len(sha256) == 64 and sha256.startswith(start) and len(start) == 2


def view_paths_of(
    layout: StorePaths, sha256: str, manifests: Iterable[Manifest], leases: Iterable[ModelLease]
) -> list[Path]:
    """Return the paths of a blob in the views of these manifests and leases."""
    paths = [layout.view_file(m, f.path) for m in manifests for f in m.files if f.sha256 == sha256]
    for lease in leases:
        view = layout.lease_view(lease.id)
        paths += [view_file_path(view, path) for path, blob in lease.files.items() if blob == sha256]
    return paths


def delete_files(paths: Iterable[Path], inode: int | None = None) -> set[Path]:
    """Delete these files of views, all or only those with this inode. Returns their directories."""
    directories = set()
    for path in paths:
        with suppress(FileNotFoundError):
            if inode is None or path.stat().st_ino == inode:
                path.unlink()
        directories.add(path.parent)
    return directories


def _link(blob: Path, target: Path, methods: list[LinkMethod]) -> None:
    while True:
        link, refusals = methods[0]
        try:
            link(blob, target)
            return
        except OSError as e:
            if e.errno not in refusals:
                raise
            if e.errno == errno.EMLINK:  # this blob has too many names; the next one may not
                _symlink(blob, target)
                return
            methods.pop(0)  # what the file system cannot do, it cannot do for the model's other files either


def _reflink(blob: Path, target: Path) -> None:
    if sys.platform == "darwin":
        _clonefile(blob, target)
        return
    with blob.open("rb", buffering=0) as source:
        blob_stat = os.fstat(source.fileno())
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
        try:
            fcntl.ioctl(fd, _FICLONE, source.fileno())
            os.fchmod(fd, _MODE)  # whatever the umask
            # Last: until it has the blob's mtime it does not count as the blob, and would be replaced.
            os.utime(fd, ns=(blob_stat.st_atime_ns, blob_stat.st_mtime_ns))
        except BaseException:
            with suppress(OSError):
                target.unlink()
            raise
        finally:
            os.close(fd)


def _clonefile(blob: Path, target: Path) -> None:
    """Clone a file on macOS by clonefile(2), which keeps mode and times."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if libc.clonefile(os.fsencode(blob), os.fsencode(target), ctypes.c_uint32(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(blob), None, str(target))


def _hard_link(blob: Path, target: Path) -> None:
    target.hardlink_to(blob)


def _symlink(blob: Path, target: Path) -> None:
    target.symlink_to(blob)


LinkMethod = tuple[Callable[[Path, Path], None], tuple[int, ...]]
_METHODS: tuple[LinkMethod, ...] = ((_reflink, _NO_REFLINK), (_hard_link, _NO_HARD_LINK), (_symlink, ()))
