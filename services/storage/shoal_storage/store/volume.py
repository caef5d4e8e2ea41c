"""A volume, which is a second disk for blobs: create it, open it, check whether it is mounted. Blocking: for threads.

    <volume>/VERSION      `further 1 <id>`, 16 hexadecimal digits; written last when a volume is created
    <volume>/lock         held by the storage service that uses the volume; names the holder
    <volume>/ballast, blobs/sha256/, partial/, tombs/, quarantine/    as in a store
    <store>/volumes/<id>    symbolic link to the volume; durable before anything is written to the volume

The store records each volume's id and path and accepts only that id at that path: an empty mount point or another
disk mounted there is not the volume. A volume is created only at a path without a record, and never on the file
system of the store or of another volume, which is what an unmounted disk usually leaves at its path.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shoal_common.errors import BadInput, ShoalError, Unsupported
from shoal_common.host.file_kinds import read_text_file
from shoal_common.host.private_files import DIRECTORY_MODE, deny_others
from shoal_common.logs import StructuredLogger
from shoal_common.store.ballast import BallastFile
from shoal_common.store.blob_lookup import read_volumes
from shoal_common.store.mounts import NETWORK_FILE_SYSTEMS, file_system_of, mounts
from shoal_common.store.store_paths import StorePaths
from shoal_common.store.verification_stamp import write_stamp
from shoal_storage.files.atomic_file import fsync_path, make_directory, replace_file
from shoal_storage.files.real_path import resolve_path
from shoal_storage.files.store_lock import take_lock

log = StructuredLogger("volumes")

VOLUME_VERSION = "1"
_VERSION = re.compile(r"further (\d+) ([0-9a-f]{16})")
_ID_BYTES = 8


class VolumeMissing(Exception):
    """A volume is not at its path; the message says what is there instead."""


class Volume:
    """An open volume, locked against other processes."""

    def __init__(self, path: Path, volume_id: str, lock: BinaryIO, ballast_bytes: int) -> None:
        self.path, self.id = path, volume_id
        self.layout = StorePaths(path)
        self.ballast = BallastFile(self.layout.ballast, ballast_bytes)
        self._lock = lock
        self._fd = os.open(path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._fd)

    def close(self) -> None:
        """Release the volume, so that its disk can be unmounted and another process can open it."""
        self._lock.close()
        self._closing()

    def is_mounted(self) -> bool:
        """Return whether the opened volume is still mounted at its path."""
        try:
            same = os.path.samestat(os.fstat(self._fd), self.path.stat())
            return same and _read_id(self.layout) == self.id and self.layout.blobs.is_dir()
        except (OSError, ShoalError):
            return False

    @property
    def device(self) -> int:
        """Device number of its file system, valid while mounted."""
        return os.fstat(self._fd).st_dev

    def free_bytes(self) -> int:
        """Return the bytes its file system has available now. Raises OSError."""
        s = os.statvfs(self._fd)
        return s.f_bavail * s.f_frsize


def open_volume(
    store: StorePaths, path: Path, ballast_bytes: int = 0, others: Iterable[tuple[str, Path]] = ()
) -> Volume:
    """Open a volume of a store; create it if the store has no record of it and none exists at the path.

    Never creates one on the file system of one of `others`. Raises VolumeMissing; AlreadyRunning, naming the holder;
    Unsupported and BadInput for a path that cannot be a volume; OSError.
    """
    recorded_id = next((volume_id for volume_id, volume_path in read_volumes(store) if volume_path == path), "")
    paths = StorePaths(path)
    volume_id = _read_id(paths)
    if recorded_id and volume_id != recorded_id:
        raise VolumeMissing(
            f"another volume ({volume_id}) is mounted there: remove this volume from the settings and add it again"
            if volume_id
            else "it is not mounted: mount its disk"
        )
    _refuse_unfit(path)
    if not volume_id:
        reject_same_disk(path, others)
    if not path.exists() and path.parent.is_dir():
        path.mkdir(DIRECTORY_MODE)
        fsync_path(path.parent)
    lock = take_lock(paths.lock, f"the volume at {path}", f"the store at {store.root}, pid {os.getpid()}")
    try:
        if not write_stamp("0" * 64, paths.lock):
            raise Unsupported(
                f"the file system of {path} does not keep nanoseconds in mtimes, which mark verified blobs: give a "
                "directory on another disk"
            )
        for directory in (paths.blobs, paths.partials, paths.tombstones, paths.quarantine):
            make_directory(directory)
        # Not the directory itself, which may be a whole disk with other people's files.
        deny_others(path for path in paths.top_paths if path != paths.root)
        if not volume_id:
            volume_id = os.urandom(_ID_BYTES).hex()
            replace_file(paths.version, f"further {VOLUME_VERSION} {volume_id}".encode())
        volume = Volume(path, volume_id, lock, ballast_bytes)
        volume.ballast.read_size()
        return volume
    except BaseException:
        lock.close()
        raise


def record_volume(store: StorePaths, volume: Volume) -> None:
    """Record a volume's path, durably: from then on nothing else at that path is accepted as the volume."""
    link = store.volumes / volume.id
    with suppress(OSError):
        if link.readlink() == volume.path:
            return
    make_directory(store.volumes)
    link.unlink(missing_ok=True)
    link.symlink_to(volume.path)
    fsync_path(store.volumes)


def remove_unconfigured(store: StorePaths, configured: Iterable[Path]) -> None:
    """Delete the records of volumes other than those at these paths."""
    kept = set(configured)
    for volume_id, path in read_volumes(store):
        if path not in kept:
            (store.volumes / volume_id).unlink(missing_ok=True)
            fsync_path(store.volumes)


def reject_overlap(volumes: Iterable[str], libraries: Iterable[str], store: Path) -> None:
    """Raise BadInput for a volume inside, or around, the store, a library or another volume."""
    others = [(f"the store at {store}", Path(os.path.realpath(store)))]
    others += [(f"the library {library}", resolve_path(library)) for library in libraries]
    for volume in volumes:
        real = resolve_path(volume)
        for name, other in others:
            if real.is_relative_to(other) or other.is_relative_to(real):
                raise BadInput(
                    f"the volume {volume} and {name} overlap: give a directory outside of it", param="volumes"
                )
        others.append((f"the volume {volume}", real))


def reject_same_disk(path: Path, others: Iterable[tuple[str, Path]]) -> None:
    """Raise BadInput for a volume on a file system in use by one of `others`, given as names and paths."""
    device = (path if path.exists() else path.parent).stat().st_dev
    for name, other in others:
        with suppress(OSError):  # a missing volume is on none of these file systems
            if other.stat().st_dev == device:
                raise BadInput(
                    f"{path} is on the same file system as {name} and would add no space: mount its disk first, or "
                    "give a directory on another disk",
                    param="volumes",
                )


def _refuse_unfit(path: Path) -> None:
    if not path.is_dir() and not path.parent.is_dir():
        raise BadInput(
            f"neither {path} nor {path.parent} is a directory: mount its disk, or create the directory",
            param="volumes",
        )
    kind = file_system_of(path, mounts())
    if kind in NETWORK_FILE_SYSTEMS:
        raise Unsupported(
            f"{path} is on {kind}, where locks do not hold between machines, so two nodes could write to it: give a "
            "directory on a local disk"
        )


def _read_id(paths: StorePaths) -> str:
    """Return the id of the volume at this path; "" if none. Raises BadInput, Unsupported for anything else."""
    try:
        version = read_text_file(paths.version).strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise BadInput(
            f"{paths.root} has a VERSION file ({version[:40]!r}), so it is a store or something else, not a volume: "
            "give an empty directory, or add a store as a library",
            param="volumes",
        )
    if match.group(1) != VOLUME_VERSION:
        raise Unsupported(f"the volume at {paths.root} has format {match.group(1)}: update Shoal")
    return match.group(2)
