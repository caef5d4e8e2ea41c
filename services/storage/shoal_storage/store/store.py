"""A store on disk: open it, its volumes and free space, and whether they are still there. Blocking."""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from shoal_common.errors import DISK_FULL, BadInput, Unavailable, Unsupported
from shoal_common.host.file_kinds import read_text_file
from shoal_common.host.private_files import deny_others
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.store.ballast import BallastFile
from shoal_common.store.blob_lookup import find_blob
from shoal_common.store.mounts import check_locks_hold, mounts
from shoal_common.store.store_paths import FORMAT_VERSION, NAMES_WITH_CASE_VERSION
from shoal_common.store.verification_stamp import write_stamp
from shoal_storage.admission.name_folding import NameFolding
from shoal_storage.files.atomic_file import make_directory, replace_file
from shoal_storage.files.store_lock import take_lock
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.store.folding_probe import read_folding
from shoal_storage.store.format_upgrade import upgrade_format
from shoal_storage.store.volume import Volume

log = StructuredLogger("disk")


class Store:
    """One node's store. Open it once; it holds the store's lock until the process ends."""

    def __init__(self, root: Path, ballast_bytes: int = 0) -> None:
        # Absolute: symbolic links in views contain this path.
        self.layout = VolumePaths(root.absolute())
        self.volumes: dict[str, Volume] = {}
        """The volumes that are present, by id."""
        self.stopping = threading.Event()
        """Set when the service stops: hashing a large blob would take longer than the shutdown allows."""
        self.ballast = BallastFile(self.layout.ballast, ballast_bytes)
        self.name_folding = NameFolding()
        """Which names of a model's files are one name here; read when the store is opened."""
        self._lock: BinaryIO | None = None
        self._root_fd: int | None = None

    def open(self) -> None:
        """Take the lock, check the format, make the directories. Raises AlreadyRunning, Unsupported, BadInput."""
        paths = self.layout
        check_locks_hold(paths.root.resolve(), mounts())
        make_directory(paths.root)
        deny_others(paths.top_paths)
        self._lock = take_lock(paths.lock, f"the store at {paths.root}", f"pid {os.getpid()}")
        if not write_stamp("0" * 64, paths.lock):
            raise Unsupported(
                f"the file system of the store at {paths.root} does not keep nanosecond file times, which mark "
                "verified blobs: put the store on another file system"
            )
        if paths.version.exists():
            _check_version(paths.root, paths.version)
        for directory in (
            paths.blobs,
            paths.leaf_lists,
            paths.partials,
            paths.manifests,
            paths.views,
            paths.tombstones,
            paths.quarantine,
            paths.leases,
            paths.distrusted,
        ):
            make_directory(directory)
        self.ballast.read_size()
        if not paths.version.exists():
            replace_file(paths.version, FORMAT_VERSION.encode())
        elif read_text_file(paths.version).strip() == NAMES_WITH_CASE_VERSION:
            self._upgrade()
        self.name_folding = read_folding(paths.root)
        if self._root_fd is None:
            self._root_fd = os.open(paths.root, os.O_RDONLY)
            self._closing = weakref.finalize(self, os.close, self._root_fd)

    def _upgrade(self) -> None:
        try:
            upgrade_format(self.layout)
        except OSError as e:
            if e.errno not in DISK_FULL or not self.ballast.release():
                raise
            upgrade_format(self.layout)

    def close(self) -> None:
        """Close the store, so that another process can open it. The end of the process does that too."""
        for volume_id in list(self.volumes):
            self.detach_volume(volume_id)
        if self._lock is not None:
            self._lock.close()
        if self._root_fd is not None:
            self._closing()
        self._lock = self._root_fd = None

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and not closed."""
        return self._root_fd is not None

    def is_present(self) -> bool:
        """Whether the opened store is still at its path: not unmounted, moved or removed whole.

        While it is not, what is missing below the path says nothing about the store's contents.
        """
        paths = self.layout
        try:
            assert self._root_fd is not None
            same = os.path.samestat(os.fstat(self._root_fd), paths.root.stat())
        except OSError:
            return False
        has_own_files = paths.version.is_file() or paths.lock.is_file()
        return same and has_own_files and paths.blobs.is_dir() and paths.manifests.is_dir()

    def are_all_present(self) -> bool:
        """Whether the store and every open volume are at their paths."""
        return self.is_present() and all(root.is_mounted() for root in list(self.volumes.values()))

    def require_present(self) -> None:
        """Raise Unavailable while the store is not at its path."""
        if not self.is_present():
            raise Unavailable(f"the store is not at {self.layout.root}: mount its disk, or put it back")

    # Volumes

    def attach_volume(self, volume: Volume) -> None:
        """Add a volume that is present: blobs may be on it. `startup.attach_volume` reads which."""
        self.volumes[volume.id] = volume
        self.layout.add_volume(volume.id, volume.path)

    def detach_volume(self, volume_id: str) -> None:
        """Close a volume that is missing or no longer configured. Touches none of its files."""
        self.volumes.pop(volume_id).close()
        self.layout.remove_volume(volume_id)

    def is_volume_present(self, blob: str) -> bool:
        """Whether the volume that a blob is in, or arrives in, is at its path. True for the store."""
        volume_id = self.layout.volume_of(blob)
        return not volume_id or (volume_id in self.volumes and self.volumes[volume_id].is_mounted())

    def require_volume(self, blob: str) -> None:
        """Raise Unavailable while the volume that a blob is in, or arrives in, is not at its path."""
        if not self.is_volume_present(blob):
            raise Unavailable(f"the volume with blob {blob[:16]}… is missing: mount its disk")

    @property
    def device(self) -> int:
        """The device number of the store's file system."""
        return (self.layout.root.stat() if self._root_fd is None else os.fstat(self._root_fd)).st_dev

    def free_bytes(self) -> int:
        """Return the free bytes of the store's file system."""
        # Of the store that was opened: its path may lead elsewhere, or nowhere, by now.
        s = os.statvfs(self.layout.root if self._root_fd is None else self._root_fd)
        return s.f_bavail * s.f_frsize

    def is_out_of_inodes(self) -> bool:
        """Whether the file system is out of inodes. Some file systems do not count them."""
        s = os.statvfs(self.layout.root)
        return s.f_files > 0 and s.f_favail == 0

    # Partial blobs

    # Commit

    def check_stopping(self) -> None:
        """Raise Unavailable once the service stops. Called between the steps of long operations."""
        if self.stopping.is_set():
            raise Unavailable("storage is stopping; try again when it is back")

    def missing_files(self, blobs: Iterable[str]) -> list[str]:
        """Return the blobs whose files are no longer where they were."""
        return [sha256 for sha256 in blobs if not self.layout.blob(sha256).exists()]

    def missing_blobs(self, manifest: Manifest) -> list[str]:
        """Return the blobs of a manifest not on disk, or not the verified files, whatever the ledger says."""
        return [blob for blob, size_bytes in manifest.blob_sizes.items() if not self._has_blob(blob, size_bytes)]

    def _has_blob(self, sha256: str, size_bytes: int) -> bool:
        """Whether a blob is in the store, or in a library and unchanged."""
        try:
            return find_blob(self.layout, sha256).stat().st_size == size_bytes
        except OSError:
            return False

    # Models

    # Files

    def delete(self, path: Path) -> None:
        """Delete a file, or a directory with its contents. A directory goes atomically, by a rename into tombs/."""
        if path.is_dir() and not path.is_symlink():
            trash = path
            tombstones = self.layout.volume_of_path(path).tombstones
            if path.parent != tombstones:
                trash = tombstones / f"{os.urandom(6).hex()}-{path.name[:80]}"
                try:
                    path.replace(trash)
                except FileNotFoundError:
                    return
            shutil.rmtree(trash)
        else:
            path.unlink(missing_ok=True)


def _check_version(root: Path, file: Path) -> None:
    version = read_text_file(file).strip()
    if version in (FORMAT_VERSION, NAMES_WITH_CASE_VERSION):
        return
    if version.isdecimal():
        raise Unsupported(
            f"the store at {root} has format {version}; this version of Shoal supports {FORMAT_VERSION}: "
            "update Shoal, or give the node another store"
        )
    raise BadInput(
        f"{file} holds {version[:40]!r} instead of the store's format: write {NAMES_WITH_CASE_VERSION} into it if "
        f"{root} is a store, or give the node another store"
    )
