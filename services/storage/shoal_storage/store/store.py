"""A store on disk: opening it, partial blobs, commits and deletions, in the orders of DESIGN §7. Blocking.

Order of a commit: data; fsync and verification in parallel; chmod; verification stamp; leaf hashes; rename; fsync of
both directories; the manifest last. Order of a deletion: the manifest first, into tombs/, then view and blobs, then
the manifest's tombstone. A start that finds a tombstone finishes that deletion (`startup.py`).
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shoal_common.errors import Corrupt, NotFound, ShoalError, Unavailable, Unsupported
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct, decode, encode
from shoal_common.messages.manifest import Manifest
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import Bitmap
from shoal_common.store.blob_lookup import find_blob
from shoal_common.store.leaf_set import from_bitmap
from shoal_common.store.mounts import check_locks_hold, mounts
from shoal_common.store.store_paths import FORMAT_VERSION, StorePaths
from shoal_common.store.verification_stamp import has_stamp, write_stamp
from shoal_storage.files import leaf_hash_file
from shoal_storage.files.atomic_file import fsync_path, make_directory, replace_file
from shoal_storage.files.ballast import BallastFile
from shoal_storage.files.blob_stat import VERIFIED_MODE, stat_blob
from shoal_storage.files.hashing import FileHashes, hash_file
from shoal_storage.files.leaf_list_verify import read_sealed_list, verify_leaves
from shoal_storage.files.store_lock import take_lock
from shoal_storage.files.volume_paths import VolumePaths
from shoal_storage.ledger.entries import PartialBlobInfo
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.store.views import build_view, delete_view
from shoal_storage.store.volume import Volume

log = StructuredLogger("disk")

PARTIAL_MODE = 0o644


class PartialMeta(WireStruct):
    """`partial/<blob>/meta.json`: the reservation of a partial blob."""

    size_bytes: int
    models: list[str]
    leaves: dict[str, list[list[int]]] = {}
    """The leaves wanted by each model that does not want the whole blob, `[first, last)` each."""


class Store:
    """One node's store. Open it once; it holds the store's lock until the process ends."""

    def __init__(self, root: Path, reserve_bytes: int = 0) -> None:
        # Absolute: symbolic links in views contain this path.
        self.layout = VolumePaths(root.absolute())
        self.volumes: dict[str, Volume] = {}
        """The volumes that are present, by id."""
        self.stopping = threading.Event()
        """Set when the service stops: hashing a large blob would take longer than the shutdown allows."""
        self.ballast = BallastFile(self.layout.ballast, reserve_bytes)
        self._lock: BinaryIO | None = None
        self._root_fd: int | None = None

    def open(self) -> None:
        """Take the lock, check the format, make the directories. Raises Claimed, Unsupported."""
        paths = self.layout
        check_locks_hold(paths.root.resolve(), mounts())
        make_directory(paths.root)
        self._lock = take_lock(paths.lock, f"the store at {paths.root}", f"pid {os.getpid()}")
        if not write_stamp("0" * 64, paths.lock):
            raise Unsupported(
                f"the file system of the store at {paths.root} does not keep nanosecond file times, which mark "
                "verified blobs: put the store on another file system"
            )
        if paths.version.exists() and (version := paths.version.read_text().strip()) != FORMAT_VERSION:
            raise Unsupported(
                f"the store at {paths.root} has format {version}; this version of Shoal supports {FORMAT_VERSION}: "
                "update Shoal, or give the node another store"
            )
        for directory in (
            paths.blobs,
            paths.leaf_lists,
            paths.partials,
            paths.manifests,
            paths.views,
            paths.tombs,
            paths.quarantine,
            paths.leases,
        ):
            make_directory(directory)
        if not paths.version.exists():
            replace_file(paths.version, FORMAT_VERSION.encode())
        self.ballast.read_size()
        if self._root_fd is None:
            self._root_fd = os.open(paths.root, os.O_RDONLY)
            self._closing = weakref.finalize(self, os.close, self._root_fd)

    def close(self) -> None:
        """Close the store, so that another process can open it. The end of the process does that too."""
        for volume_id in list(self.volumes):
            self.detach_volume(volume_id)
        if self._lock is not None:
            self._lock.close()
        if self._root_fd is not None:
            self._closing()
        self._lock = self._root_fd = None

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
        volume_id = self.layout.volume_by_blob.get(blob, "")
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

    def allocated_bytes(self, blob: str, size_bytes: int) -> int:
        """Return the bytes that a partial blob occupies; preallocation past its size does not count."""
        try:
            return min((self.layout.partial(blob) / "data").stat().st_blocks * 512, size_bytes)
        except OSError:
            return 0

    def refresh_partial(self, blob: str, partial: PartialBlobInfo) -> None:
        """Refresh the allocated bytes and durable leaves of a partial blob."""
        partial.allocated_bytes = self.allocated_bytes(blob, partial.size_bytes)
        if partial.leaves_by_model:
            partial.durable_leaves = self.durable_leaves(blob, partial.size_bytes)

    def durable_leaves(self, blob: str, size_bytes: int) -> int:
        """Return the leaves in a partial blob's bitmap."""
        try:
            return from_bitmap(Bitmap(size_bytes, (self.layout.partial(blob) / "have").read_bytes()).to_bytes())
        except FileNotFoundError:
            return 0

    def has_partial(self, blob: str) -> bool:
        """Whether a partial blob's data file still exists."""
        return (self.layout.partial_link(blob) / "data").is_file()

    def write_partial(
        self, blob: str, size_bytes: int, models: Iterable[str], wanted: Mapping[str, int] | None = None
    ) -> None:
        """Make a partial blob's directory, or change which models reserve it, and which leaves each wants."""
        self.require_volume(blob)
        directory = self.layout.partial(blob)
        directory.mkdir(exist_ok=True)
        if not (directory / "data").exists():
            for claims in ("have", "ready", "leaves"):  # they describe data that is gone
                (directory / claims).unlink(missing_ok=True)
            (directory / "data").touch(mode=PARTIAL_MODE)
        # Last: a directory with a meta.json is a reservation and has its data.
        ranges = {model: leaf_set.to_ranges(leaves) for model, leaves in (wanted or {}).items()}
        meta = PartialMeta(size_bytes=size_bytes, models=sorted(models), leaves=ranges)
        replace_file(directory / "meta.json", encode(meta))
        fsync_path(directory.parent)
        self.link_partial(blob)

    def link_partial(self, blob: str) -> None:
        """Link a volume's partial blob into the store, where the other services look. A start does it again."""
        link, directory = self.layout.partial_link(blob), self.layout.partial(blob)
        if link == directory or (link.is_symlink() and link.readlink() == directory):
            return
        self.delete(link)
        link.symlink_to(directory)

    def delete_partial(self, blob: str) -> None:
        """Delete a partial blob and its reservation, durably: one that came back would stay reserved for ever."""
        directory = self.layout.partial(blob)
        self.delete(directory)
        fsync_path(directory.parent)
        self._unlink_partial(blob)

    def _unlink_partial(self, blob: str) -> None:
        link = self.layout.partial_link(blob)
        if link.is_symlink():
            link.unlink(missing_ok=True)

    # Commit

    def verify_partial(self, blob: str, size_bytes: int, leaf_list_digest: str = "") -> FileHashes:
        """Make a partial blob durable and hash all of it: by leaf if its list has the given digest, else by sha256.

        Raises Corrupt on a mismatch; CorruptLeaves when only some leaves mismatch.
        """
        data, failed = self.layout.partial(blob) / "data", threading.Event()
        hashes = read_sealed_list(self.layout, blob, size_bytes, leaf_list_digest)

        def on_progress() -> None:
            self.check_stopping()
            if failed.is_set():
                raise Unavailable("fsync failed; hashing stopped")

        # In parallel: fsync waits for the disk, hashing for the processor.
        with data.open("rb") as f, ThreadPoolExecutor(1) as executor:
            if hashes is None:
                hashing = executor.submit(hash_file, data, blob.startswith("git-"), on_progress)
            else:
                hashing = executor.submit(verify_leaves, data, blob, size_bytes, hashes, on_progress)
            try:
                os.fsync(f.fileno())
            except OSError as e:
                failed.set()
                # Final: the next fsync would report success although the bytes are lost.
                raise Corrupt(
                    f"the disk could not store the bytes of {blob[:16]}… ({e.strerror}); "
                    "they are discarded and fetched again"
                ) from None
            digests = hashing.result()
        name = f"git-{digests.git_sha1}" if digests.git_sha1 else digests.sha256
        if name != blob or digests.size_bytes != size_bytes:
            raise Corrupt(
                f"the bytes received for {blob[:16]}… hash to {name[:16]}… ({digests.size_bytes} of {size_bytes} "
                "bytes); they are discarded and fetched again",
                expected=blob,
                found=name,
            )
        return digests

    def check_stopping(self) -> None:
        """Raise Unavailable once the service stops. Called between the steps of long operations."""
        if self.stopping.is_set():
            raise Unavailable("storage is stopping; try again when it is back")

    def commit(self, blob: str, digests: FileHashes) -> None:
        """Give verified bytes their name. After this returns, the blob survives a power cut."""
        self.require_volume(blob)
        paths = self.layout
        source, target = paths.partial(blob), paths.blob(digests.sha256)
        existing = stat_blob(paths, target)
        # A verified blob that is here stays: views link to that very file.
        if existing is None or not existing.is_verified or existing.size_bytes != digests.size_bytes:
            target = paths.blob_on(paths.volume_by_blob.get(blob, ""), digests.sha256)
            self._name(source / "data", target, digests)
            self.set_volume(digests.sha256, paths.volume_by_blob.get(blob, ""))
            fsync_path(source)
        # Also if it was here already: an earlier attempt may have failed, or been killed, just before this.
        fsync_path(target.parent)
        # Good bytes replace the corrupt ones, which have no more leaves to give.
        self.delete_quarantined(digests.sha256)
        self.delete(source)
        self._unlink_partial(blob)
        if blob != digests.sha256:
            paths.set_volume(blob, "")

    def set_volume(self, blob: str, volume_id: str) -> None:
        """Record that a blob is, or is to go, on a volume; "": the store. Drops its quarantined bytes elsewhere."""
        if self.layout.volume_by_blob.get(blob, "") != volume_id:
            self.delete_quarantined(blob)
            self.layout.set_volume(blob, volume_id)

    def _name(self, data: Path, target: Path, digests: FileHashes) -> None:
        file_stat = data.stat()
        if file_stat.st_mtime_ns != digests.mtime_ns and not has_stamp(digests.sha256, file_stat):
            raise Unavailable(f"{digests.sha256[:16]}… was modified after it was verified; try again")
        try:
            data.chmod(VERIFIED_MODE)
            write_stamp(digests.sha256, data)
            leaf_hash_file.write(self.layout, digests.sha256, digests.leaf_hashes, data.stat().st_mtime_ns)
            make_directory(target.parent, self.layout.volume_of_path(target).root)
            data.replace(target)
        except OSError:
            data.chmod(PARTIAL_MODE)  # it is still a partial blob and may be written to
            raise

    def delete_quarantined(self, sha256: str) -> None:
        """Delete a blob from quarantine, durably: its bitmap must not come back beside other bytes."""
        for _, volume_paths in self.layout.each_volume():
            files = [
                p
                for p in (
                    StorePaths.quarantined(volume_paths, sha256),
                    StorePaths.quarantined_have(volume_paths, sha256),
                )
                if p.exists()
            ]
            for path in files:
                path.unlink(missing_ok=True)
            if files:
                fsync_path(volume_paths.quarantine)

    def delete_blob(self, sha256: str) -> None:
        """Delete a blob, durably, on every volume. Absent already is fine."""
        known_volume_id = self.layout.volume_by_blob.get(sha256, "")
        for volume_id, _ in self.layout.each_volume():
            if volume_id == known_volume_id or self._is_proven_in(volume_id, sha256):
                self.delete_copy(sha256, volume_id)
        leaf_hash_file.delete(self.layout, sha256)

    def _is_proven_in(self, volume_id: str, sha256: str) -> bool:
        with suppress(OSError):
            return has_stamp(sha256, self.layout.blob_on(volume_id, sha256).lstat())
        return False

    def delete_copy(self, sha256: str, volume_id: str) -> None:
        """Delete a blob's file on one volume, durably. Absent already is fine."""
        path = self.layout.blob_on(volume_id, sha256)
        path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            fsync_path(path.parent)  # also if it was absent: an earlier attempt may have failed here
        with suppress(OSError):  # other blobs are in it
            path.parent.rmdir()

    def missing_files(self, blobs: Iterable[str]) -> list[str]:
        """Return the blobs whose files are no longer where they were."""
        return [sha256 for sha256 in blobs if not self.layout.blob(sha256).exists()]

    def missing_blobs(self, manifest: Manifest) -> list[str]:
        """Return the blobs of a manifest not on disk, or not the verified files, whatever the ledger says."""
        return [blob for blob, size_bytes in manifest.blob_sizes.items() if not self._is_here(blob, size_bytes)]

    def _is_here(self, sha256: str, size_bytes: int) -> bool:
        """Whether a blob is in the store, or in a library and unchanged."""
        try:
            return find_blob(self.layout, sha256).stat().st_size == size_bytes
        except OSError:
            return False

    # Models

    def seal(self, manifest: Manifest) -> None:
        """Build the view, then write the manifest: from then on the model is present (I2)."""
        self.build_view(manifest)
        path = self.layout.manifest(manifest.repo, manifest.commit)
        make_directory(path.parent)
        replace_file(path, encode(manifest))

    def build_view(self, manifest: Manifest) -> None:
        """Link every file of a model into its view. Raises OSError, also when the store is missing."""
        if self._root_fd is not None and not self.is_present():
            raise FileNotFoundError(errno.ENOENT, "the store is missing", str(self.layout.root))
        build_view(self.layout, manifest)

    def begin_delete(self, repo: str, commit: str) -> None:
        """Move a model's manifest into tombs/: the model is gone, and `finish_delete` deletes the rest of it.

        Raises OSError, or Unavailable if the store is missing; then nothing has changed. Absent already is fine.
        """
        self.require_present()
        with suppress(FileNotFoundError):
            self.layout.manifest(repo, commit).replace(self.layout.tombstone(repo, commit))

    def finish_delete(self, repo: str, commit: str, blobs: Iterable[str]) -> None:
        """Delete the rest of a model without a manifest, and the blobs that only it needs.

        Absent already is fine. After an OSError its tombstone remains; call this again.
        """
        path, view, tomb = (
            path_of(repo, commit) for path_of in (self.layout.manifest, self.layout.view, self.layout.tombstone)
        )
        # Also if it was absent: an earlier attempt may have failed here.
        fsync_path(self.layout.tombs)
        with suppress(FileNotFoundError):
            fsync_path(path.parent)
        delete_view(view, read_tombstone(tomb))
        for empty in (path.parent, view.parent):
            with suppress(OSError):  # another commit of the model is in it
                empty.rmdir()
        for sha256 in blobs:
            self.delete_blob(sha256)
        # Durably too: a tombstone that came back would take newly fetched blobs with it.
        tomb.unlink(missing_ok=True)
        fsync_path(self.layout.tombs)

    def find_by_git_sha1(self, git_sha1: str, size_bytes: int, ledger: Ledger) -> str | None:
        """Return the present blob with this git hash, searched among those of the same size; None without one."""
        for sha256, size in ledger.blobs.items():
            if size == size_bytes:
                try:
                    if (
                        hash_file(self.layout.blob(sha256), with_git=True, on_progress=self.check_stopping).git_sha1
                        == git_sha1
                    ):
                        return sha256
                except FileNotFoundError:
                    continue
        return None

    # Files

    def delete(self, path: Path) -> None:
        """Delete a file, or a directory with its contents. A directory goes atomically, by a rename into tombs/."""
        if path.is_dir() and not path.is_symlink():
            tomb = path
            tombs = self.layout.volume_of_path(path).tombs
            if path.parent != tombs:
                tomb = tombs / f"{os.urandom(6).hex()}-{path.name[:80]}"
                try:
                    path.replace(tomb)
                except FileNotFoundError:
                    return
            shutil.rmtree(tomb)
        else:
            path.unlink(missing_ok=True)


def require_all_blobs(manifest: Manifest, ledger: Ledger) -> None:
    """Raise NotFound or Corrupt unless every file of a manifest is a blob of the right size."""
    for f in manifest.files:
        size_bytes = ledger.blob_size(f.sha256)
        if size_bytes is None:
            raise NotFound(f"{f.path} of {manifest.model} is not here: blob {f.sha256[:16]}… is missing")
        if size_bytes != f.size_bytes:
            raise Corrupt(f"{f.path} of {manifest.model} and its blob {f.sha256[:16]}… differ in size")


def read_tombstone(tomb: Path) -> Manifest | None:
    """Return the manifest in a tombstone; None if it cannot be read."""
    with suppress(ShoalError, OSError):
        return decode(tomb.read_bytes(), Manifest)
    return None
