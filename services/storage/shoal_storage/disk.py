"""What storage does to the disk, in the orders that DESIGN §7 gives. Blocking: runs in threads.

Order of a commit: data, fsync, verify, chmod, rename, fsync of both directories; the manifest last. Order of a
delete: the manifest first, into tombs/, then view and blobs, then the manifest's tomb: a start that finds one there
finishes that deletion.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shoal_common.blobs import find_blob
from shoal_common.errors import BadName, Claimed, Corrupt, NotFound, ShoalError, Unavailable, Unsupported
from shoal_common.layout import FORMAT_VERSION, Layout
from shoal_common.logs import Log
from shoal_common.messages import Message, decode, encode
from shoal_common.messages.records import Manifest
from shoal_common.names import check_blob, check_commit
from shoal_storage.decide import Ledger, Partial, check_manifest, left_behind
from shoal_storage.digests import Digests, digest
from shoal_storage.filesystem import mounts, refuse_lying_locks

log = Log("disk")

_BLOB_MODE = 0o444
_PARTIAL_MODE = 0o644
_NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP)


class PartialMeta(Message):
    """`partial/<blob>/meta.json`: the reservation that the partial carries."""

    size_bytes: int
    models: list[str]


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Disk:
    """One node's store. Open it once; it holds the store's lock until the process ends."""

    def __init__(self, root: Path) -> None:
        # Absolute: symbolic links in views name blobs by it.
        self.layout = Layout(root.absolute())
        self.stopping = threading.Event()
        """Set when the service stops: hashing a large blob would outlast the time there is."""
        self._lock: BinaryIO | None = None

    def open(self) -> None:
        """Take the lock, check the format, make the directories. Raises Claimed, Unsupported."""
        lay = self.layout
        refuse_lying_locks(lay.root.resolve(), mounts())
        self._make(lay.root)
        self._take_lock()
        if lay.version.exists() and (found := lay.version.read_text().strip()) != FORMAT_VERSION:
            raise Unsupported(
                f"the store at {lay.root} has format {found} and this version of Shoal knows {FORMAT_VERSION}: "
                "update Shoal, or give the node another store"
            )
        for directory in (lay.blobs, lay.partials, lay.manifests, lay.views, lay.tombs, lay.quarantine):
            self._make(directory)
        if not lay.version.exists():
            self._write(lay.version, FORMAT_VERSION.encode())

    def _make(self, directory: Path) -> None:
        """Make a directory and those above it, durably: what is kept in it is lost with a name that is not."""
        if not directory.exists():
            self._make(directory.parent)
            directory.mkdir(exist_ok=True)
            sync_directory(directory.parent)

    def _take_lock(self) -> None:
        f = self.layout.lock.open("a+b", buffering=0)
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            holder = f.read().decode(errors="replace").strip()
            f.close()
            raise Claimed(f"the store at {self.layout.root} is open already, by {holder}; stop that one") from None
        self._lock = f
        with suppress(OSError):  # a full disk must not keep the one from starting that can empty it
            f.truncate(0)
            f.write(f"pid {os.getpid()}".encode())

    def free_bytes(self) -> int:
        """Bytes the file system would give us now."""
        s = os.statvfs(self.layout.root)
        return s.f_bavail * s.f_frsize

    # Start

    def recover(self) -> Ledger:
        """Finish what a crash interrupted, and say what the disk holds, by stat alone.

        Strange files are left where they are, and logged.
        """
        lay = self.layout
        for unfinished in (*lay.root.glob(".*.new"), *lay.manifests.glob("*/.*.new")):
            unfinished.unlink(missing_ok=True)
        deleted = list(self._read_tombs())
        ledger = self._scan()
        for manifest in deleted:
            for sha256 in left_behind(manifest, ledger):
                self.remove_blob(sha256)
                del ledger.blobs[sha256]
        for view in lay.views.glob("*/*"):
            # Of a model whose deletion, or whose sealing, was interrupted. Its links would keep blobs on the disk.
            with suppress(BadName):
                name, commit = view.parent.name, check_commit(view.name)
                known = lay.manifests / name / f"{commit}.json", lay.adopted_models / f"{name}@{commit}"
                if not any(path.exists() for path in known):
                    self._remove(view)
        for tomb in lay.tombs.iterdir():
            self._remove(tomb)
        return ledger

    def _read_tombs(self) -> Iterator[Manifest]:
        for tomb in self.layout.tombs.glob("*.json"):
            with suppress(ShoalError, OSError):
                yield decode(tomb.read_bytes(), Manifest)

    def _scan(self) -> Ledger:
        ledger = Ledger()
        for path in self.layout.blobs.glob("*/*"):
            size = self._blob_size(path)
            if size is None:
                log.warning("not a blob; left alone", path=path)
            else:
                ledger.blobs[path.name] = size
        for directory in self.layout.partials.iterdir():
            partial = self._read_partial(directory, ledger)
            if partial is not None:
                ledger.partials[directory.name] = partial
        for manifest in self._read_manifests():
            missing = [f.path for f in manifest.files if ledger.blobs.get(f.sha256) != f.size_bytes]
            if missing:
                log.warning("model is not whole; not announced", model=manifest.model, missing=",".join(missing[:5]))
            (ledger.broken if missing else ledger.manifests)[manifest.model] = manifest
        return ledger

    def _blob_size(self, path: Path) -> int | None:
        """Size of a file that is a blob by name, place and kind."""
        try:
            if path != self.layout.blob(path.name):
                return None
            found = path.lstat()
        except (BadName, OSError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) and not path.name.startswith("git-") else None

    def _read_partial(self, directory: Path, ledger: Ledger) -> Partial | None:
        try:
            blob = check_blob(directory.name)
            meta = decode((directory / "meta.json").read_bytes(), PartialMeta)
            # A commit that was interrupted before its rename has made this read-only.
            (directory / "data").chmod(_PARTIAL_MODE)
        except BadName:
            log.warning("not a partial; left alone", path=directory)
            return None
        except (ShoalError, FileNotFoundError, NotADirectoryError):
            # Its reservation was never acknowledged, or its data is a blob by now.
            log.info("a partial that was being made or committed; removed", path=directory)
            self._remove(directory)
            return None
        if ledger.blobs.get(blob) == meta.size_bytes:
            self._remove(directory)
            return None
        return Partial(meta.size_bytes, self.allocated_bytes(blob, meta.size_bytes), set(meta.models))

    def _read_manifests(self) -> Iterator[Manifest]:
        for path in sorted(self.layout.manifests.glob("*/*.json")):
            try:
                manifest = decode(path.read_bytes(), Manifest)
                check_manifest(manifest)
                if not manifest.sealed or path != self.layout.manifest(manifest.repo, manifest.commit):
                    raise BadName(f"it is the manifest of {manifest.model}, unsealed or out of its place")
            except (ShoalError, OSError) as e:
                log.warning("not a manifest; left alone", path=path, why=str(e))
                continue
            yield manifest

    # Partials

    def allocated_bytes(self, blob: str, size_bytes: int) -> int:
        """Bytes a partial occupies; a file system's preallocation past its size does not count."""
        try:
            return min((self.layout.partial(blob) / "data").stat().st_blocks * 512, size_bytes)
        except OSError:
            return 0

    def has_partial(self, blob: str) -> bool:
        """Whether a partial's file is still there for bytes to be written to."""
        return (self.layout.partial(blob) / "data").is_file()

    def write_partial(self, blob: str, size_bytes: int, models: Iterable[str]) -> None:
        """Make a partial's directory, or change for which models it is reserved."""
        directory = self.layout.partial(blob)
        directory.mkdir(exist_ok=True)
        (directory / "data").touch(mode=_PARTIAL_MODE)
        # Last: a directory with a meta.json is a reservation, and has its data.
        self._write(directory / "meta.json", encode(PartialMeta(size_bytes=size_bytes, models=sorted(models))))
        sync_directory(self.layout.partials)

    def remove_partial(self, blob: str) -> None:
        """Drop a partial's bytes and its reservation, durably: one that came back would be promised for ever."""
        self._remove(self.layout.partial(blob))
        sync_directory(self.layout.partials)

    # Commit

    def verify_partial(self, blob: str, size_bytes: int) -> Digests:
        """Make a partial's data durable and hash all of it. Raises Corrupt when it is not what it should be."""
        data = self.layout.partial(blob) / "data"
        with data.open("rb") as f:
            try:
                os.fsync(f.fileno())
            except OSError as e:
                # Final: the next fsync would say that all is well, and the bytes are gone.
                raise Corrupt(
                    f"the disk could not keep the bytes of {blob[:16]}… ({e.strerror}); "
                    "they are discarded and fetched again"
                ) from None
        found = digest(data, with_git=blob.startswith("git-"), between=self.keep_on)
        name = f"git-{found.git_sha1}" if found.git_sha1 else found.sha256
        if name != blob or found.size_bytes != size_bytes:
            raise Corrupt(
                f"the bytes received for {blob[:16]}… hash to {name[:16]}… ({found.size_bytes} of {size_bytes} "
                "bytes); they are discarded and fetched again",
                expected=blob,
                found=name,
            )
        return found

    def keep_on(self) -> None:
        """Raise Unavailable once the service stops: called between the steps of what takes long."""
        if self.stopping.is_set():
            raise Unavailable("storage is stopping; ask again when it is back")

    def commit(self, blob: str, digests: Digests) -> None:
        """Give verified bytes their name. After this returns, the blob survives a power cut."""
        source = self.layout.partial(blob)
        target = self.layout.blob(digests.sha256)
        if self._blob_size(target) != digests.size_bytes:  # else it is here: views hold on to that very file
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True)
                sync_directory(self.layout.blobs)
            (source / "data").chmod(_BLOB_MODE)
            (source / "data").replace(target)
            sync_directory(source)
        # If it was here too: a first attempt may have failed, or been killed, just before this.
        sync_directory(target.parent)
        # Good bytes have come in the place of corrupt ones: those taught all that they could.
        (self.layout.quarantine / digests.sha256).unlink(missing_ok=True)
        self._remove(source)

    def remove_blob(self, sha256: str) -> None:
        """Remove a blob, durably. Absent already is fine."""
        path = self.layout.blob(sha256)
        path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            sync_directory(path.parent)  # if it was absent too: a first attempt may have failed at this
        with suppress(OSError):  # other blobs live there
            path.parent.rmdir()

    def lost(self, manifest: Manifest) -> list[str]:
        """Blobs of a manifest that are not on the disk, or with another size, whatever the ledger says."""
        sizes = manifest.blob_sizes
        return [b for b in sizes if self._held_bytes(b) != sizes[b]]

    def _held_bytes(self, sha256: str) -> int | None:
        """Size of a blob in the store, else of one in a read-only root that still is as it was."""
        own = self._blob_size(self.layout.blob(sha256))
        if own is not None:
            return own
        try:
            return find_blob(self.layout, sha256).stat().st_size
        except OSError:
            return None

    # Models

    def seal(self, manifest: Manifest) -> None:
        """Build the view, then write the manifest: from then on the model is present (I2)."""
        self.build_view(manifest)
        path = self.layout.manifest(manifest.repo, manifest.commit)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            sync_directory(self.layout.manifests)
        self._write(path, encode(manifest))

    def build_view(self, manifest: Manifest) -> None:
        """Link every file of a model under its own name: hard links, or symbolic ones; never a copy.

        Into a read-only root only symbolic ones lead: a hard link would change its file.

        What is there and is not the blob (a file somebody put there, a link to what the blob was before) is replaced.
        """
        for f in manifest.files:
            target, blob = self.layout.view_file(manifest, f.path), find_blob(self.layout, f.sha256)
            if target.exists() and target.samefile(blob):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if not blob.is_relative_to(self.layout.blobs):
                target.symlink_to(blob)
                continue
            try:
                target.hardlink_to(blob)
            except OSError as e:
                if e.errno not in _NO_HARD_LINK:
                    raise
                target.symlink_to(blob)

    def delete(self, repo: str, commit: str, blobs: Iterable[str]) -> None:
        """Remove a model, sealed or not, with blobs that only it needs. What is absent already is fine.

        It is gone once its manifest is in tombs/, where that stays until all the rest has gone too.
        """
        path, view = self.layout.manifest(repo, commit), self.layout.view(repo, commit)
        tomb = self.layout.tombs / f"{path.parent.name}@{path.name}"
        with suppress(FileNotFoundError):
            path.replace(tomb)
        # If it was absent too: a first attempt may have failed at this.
        sync_directory(self.layout.tombs)
        with suppress(FileNotFoundError):
            sync_directory(path.parent)
        self._remove(view)
        for empty in (path.parent, view.parent):
            with suppress(OSError):  # another commit of the model lives there
                empty.rmdir()
        for sha256 in blobs:
            self.remove_blob(sha256)
        # Durably too: a tomb that came back would take blobs with it that have been fetched anew.
        tomb.unlink(missing_ok=True)
        sync_directory(self.layout.tombs)

    def find_git(self, git_sha1: str, size_bytes: int, ledger: Ledger) -> str | None:
        """The present blob with this git hash, looked for among those of the same size."""
        for sha256, size in ledger.blobs.items():
            if size == size_bytes:
                try:
                    if digest(self.layout.blob(sha256), with_git=True, between=self.keep_on).git_sha1 == git_sha1:
                        return sha256
                except FileNotFoundError:
                    continue
        return None

    # Small things

    def _write(self, path: Path, data: bytes) -> None:
        """Write a small file so that it is, durably, either the old or the new one."""
        fresh = path.with_name(f".{path.name}.new")
        with fresh.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        fresh.replace(path)
        sync_directory(path.parent)

    def _remove(self, path: Path) -> None:
        """Remove a file or a directory with all that is in it, atomically out of sight first."""
        if path.is_dir() and not path.is_symlink():
            tomb = path
            if path.parent != self.layout.tombs:
                tomb = self.layout.tombs / f"{os.urandom(6).hex()}-{path.name[:80]}"
                try:
                    path.replace(tomb)
                except FileNotFoundError:
                    return
            shutil.rmtree(tomb)
        else:
            path.unlink(missing_ok=True)


def require_present(manifest: Manifest, ledger: Ledger) -> None:
    """Raise NotFound or Corrupt unless every file of a manifest is a blob of the right size."""
    for f in manifest.files:
        size_bytes = ledger.bytes_of(f.sha256)
        if size_bytes is None:
            raise NotFound(f"{f.path} of {manifest.model} is not here: blob {f.sha256[:16]}… is missing")
        if size_bytes != f.size_bytes:
            raise Corrupt(f"{f.path} of {manifest.model} has another size than its blob {f.sha256[:16]}…")
