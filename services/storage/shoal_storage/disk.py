"""What storage does to the disk, in the orders that DESIGN §7 gives. Blocking: runs in threads.

Order of a commit: data, fsync and verify at the same time, chmod, proof, the leaves' hashes, rename, fsync of both
directories; the manifest last. Order of a delete: the manifest first, into tombs/, then view and blobs, then the
manifest's tomb: a start that finds one there finishes that deletion (`recovery.py`).
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

from shoal_common import leafset
from shoal_common.blobs import find_blob
from shoal_common.errors import Corrupt, NotFound, ShoalError, Unavailable, Unsupported
from shoal_common.filesystem import mounts, refuse_lying_locks
from shoal_common.layout import FORMAT_VERSION, Bitmap, Layout
from shoal_common.logs import Log
from shoal_common.messages import Message, decode, encode
from shoal_common.messages.records import Manifest
from shoal_common.proof import prove, proven
from shoal_common.runs import from_bitmap
from shoal_storage import leaves
from shoal_storage.decide import Ledger, Partial
from shoal_storage.digests import Digests, digest
from shoal_storage.durable import make_directory, sync, write_file
from shoal_storage.further import FurtherRoot
from shoal_storage.listed import compare, sealed_list
from shoal_storage.locking import take_lock
from shoal_storage.reserve import ReserveFile
from shoal_storage.scan import blob_stamp
from shoal_storage.store_layout import StoreLayout
from shoal_storage.truth import PROVEN_MODE
from shoal_storage.views import build_view, remove_view

log = Log("disk")

PARTIAL_MODE = 0o644


class PartialMeta(Message):
    """`partial/<blob>/meta.json`: the reservation that the partial carries."""

    size_bytes: int
    models: list[str]
    leaves: dict[str, list[list[int]]] = {}
    """Of those models that want it in part, the leaves that they want, `[first, last)` each."""


class Disk:
    """One node's store. Open it once; it holds the store's lock until the process ends."""

    def __init__(self, root: Path, reserve_bytes: int = 0) -> None:
        # Absolute: symbolic links in views name blobs by it.
        self.layout = StoreLayout(root.absolute())
        self.further: dict[str, FurtherRoot] = {}
        """The further roots that are there, by their ids."""
        self.stopping = threading.Event()
        """Set when the service stops: hashing a large blob would outlast the time there is."""
        self.reserve = ReserveFile(self.layout.reserve, reserve_bytes)
        self._lock: BinaryIO | None = None
        self._root_fd: int | None = None

    def open(self) -> None:
        """Take the lock, check the format, make the directories. Raises Claimed, Unsupported."""
        lay = self.layout
        refuse_lying_locks(lay.root.resolve(), mounts())
        make_directory(lay.root)
        self._lock = take_lock(lay.lock, f"the store at {lay.root}", f"pid {os.getpid()}")
        if not prove("0" * 64, lay.lock):
            raise Unsupported(
                f"the file system of the store at {lay.root} keeps no nanoseconds of a file's time, by which a blob "
                "shows that it was verified: give the node a store on another one"
            )
        if lay.version.exists() and (found := lay.version.read_text().strip()) != FORMAT_VERSION:
            raise Unsupported(
                f"the store at {lay.root} has format {found} and this version of Shoal knows {FORMAT_VERSION}: "
                "update Shoal, or give the node another store"
            )
        for directory in (
            lay.blobs,
            lay.leaf_lists,
            lay.partials,
            lay.manifests,
            lay.views,
            lay.tombs,
            lay.quarantine,
            lay.leases,
        ):
            make_directory(directory)
        if not lay.version.exists():
            write_file(lay.version, FORMAT_VERSION.encode())
        self.reserve.look()
        if self._root_fd is None:
            self._root_fd = os.open(lay.root, os.O_RDONLY)
            self._closing = weakref.finalize(self, os.close, self._root_fd)

    def close(self) -> None:
        """Give the store up, for another one to open. The end of the process does that too."""
        for identity in list(self.further):
            self.leave(identity)
        if self._lock is not None:
            self._lock.close()
        if self._root_fd is not None:
            self._closing()
        self._lock = self._root_fd = None

    def is_there(self) -> bool:
        """Whether the store that was opened is still found at its path: not unmounted, moved away or removed whole.

        While it is not, what is missing below the path says nothing of what the store holds.
        """
        lay = self.layout
        try:
            assert self._root_fd is not None
            same = os.path.samestat(os.fstat(self._root_fd), lay.root.stat())
        except OSError:
            return False
        its_own = lay.version.is_file() or lay.lock.is_file()
        return same and its_own and lay.blobs.is_dir() and lay.manifests.is_dir()

    def is_all_there(self) -> bool:
        """Whether the store is, and every further root that was."""
        return self.is_there() and all(root.is_there() for root in list(self.further.values()))

    def require_there(self) -> None:
        """Raise Unavailable while the store is not found at its path."""
        if not self.is_there():
            raise Unavailable(f"the store is not at {self.layout.root} now: mount its disk, or put it back")

    # Further roots

    def join(self, root: FurtherRoot) -> None:
        """A further root is there: blobs may be in it. What is, `recovery.take_in` says."""
        self.further[root.id] = root
        self.layout.add(root.id, root.path)

    def leave(self, identity: str) -> None:
        """A further root is there no more, or is none of ours any more. Not a file of it is touched."""
        self.further.pop(identity).close()
        self.layout.forget(identity)

    def has_root(self, blob: str) -> bool:
        """Whether the further root where a blob is, or arrives, is found at its path. True for the store."""
        identity = self.layout.where.get(blob, "")
        return not identity or (identity in self.further and self.further[identity].is_there())

    def require_root(self, blob: str) -> None:
        """Raise Unavailable while the further root where a blob is, or arrives, is not found at its path."""
        if not self.has_root(blob):
            raise Unavailable(f"the further root with blob {blob[:16]}… is not there now: mount its disk")

    @property
    def device(self) -> int:
        """The number of the store's file system."""
        return (self.layout.root.stat() if self._root_fd is None else os.fstat(self._root_fd)).st_dev

    def free_bytes(self) -> int:
        """Bytes the file system would give us now."""
        # Of the store that was opened: its path may lead elsewhere, or nowhere, by now.
        s = os.statvfs(self.layout.root if self._root_fd is None else self._root_fd)
        return s.f_bavail * s.f_frsize

    def has_no_file_left(self) -> bool:
        """Whether the file system takes no further file, however small. Not all of them count files."""
        s = os.statvfs(self.layout.root)
        return s.f_files > 0 and s.f_favail == 0

    # Partials

    def allocated_bytes(self, blob: str, size_bytes: int) -> int:
        """Bytes a partial occupies; a file system's preallocation past its size does not count."""
        try:
            return min((self.layout.partial(blob) / "data").stat().st_blocks * 512, size_bytes)
        except OSError:
            return 0

    def look_at(self, blob: str, partial: Partial) -> None:
        """Bring up to date what is known of a partial's bytes on the disk."""
        partial.allocated_bytes = self.allocated_bytes(blob, partial.size_bytes)
        if partial.leaves:
            partial.here = self.durable_leaves(blob, partial.size_bytes)

    def durable_leaves(self, blob: str, size_bytes: int) -> int:
        """The leaves of a partial that its bitmap has."""
        try:
            return from_bitmap(Bitmap(size_bytes, (self.layout.partial(blob) / "have").read_bytes()).to_bytes())
        except FileNotFoundError:
            return 0

    def has_partial(self, blob: str) -> bool:
        """Whether a partial's file is still there for bytes to be written to."""
        return (self.layout.partial_link(blob) / "data").is_file()

    def write_partial(
        self, blob: str, size_bytes: int, models: Iterable[str], wanted: Mapping[str, int] | None = None
    ) -> None:
        """Make a partial's directory, or change for which models it is reserved, and which leaves of it for whom."""
        self.require_root(blob)
        directory = self.layout.partial(blob)
        directory.mkdir(exist_ok=True)
        if not (directory / "data").exists():
            for claims in ("have", "ready", "leaves"):  # what they claim was in data that has gone
                (directory / claims).unlink(missing_ok=True)
            (directory / "data").touch(mode=PARTIAL_MODE)
        # Last: a directory with a meta.json is a reservation, and has its data.
        ranges = {model: leafset.ranges(its) for model, its in (wanted or {}).items()}
        meta = PartialMeta(size_bytes=size_bytes, models=sorted(models), leaves=ranges)
        write_file(directory / "meta.json", encode(meta))
        sync(directory.parent)
        self.link_partial(blob)

    def link_partial(self, blob: str) -> None:
        """Let everybody find a partial of a further root where they look for it. A start does it again."""
        link, directory = self.layout.partial_link(blob), self.layout.partial(blob)
        if link == directory or (link.is_symlink() and link.readlink() == directory):
            return
        self.remove(link)
        link.symlink_to(directory)

    def remove_partial(self, blob: str) -> None:
        """Drop a partial's bytes and its reservation, durably: one that came back would be promised for ever."""
        directory = self.layout.partial(blob)
        self.remove(directory)
        sync(directory.parent)
        self._unlink_partial(blob)

    def _unlink_partial(self, blob: str) -> None:
        link = self.layout.partial_link(blob)
        if link.is_symlink():
            link.unlink(missing_ok=True)

    # Commit

    def verify_partial(self, blob: str, size_bytes: int, root: str = "") -> Digests:
        """Make a partial's data durable and hash all of it: by leaf where its list has this root, else by sha256.

        Raises Corrupt when it is not what it should be; BadLeaves when only some leaves are not.
        """
        data, failed = self.layout.partial(blob) / "data", threading.Event()
        hashes = sealed_list(self.layout, blob, size_bytes, root)

        def between() -> None:
            self.keep_on()
            if failed.is_set():
                raise Unavailable("the bytes that are hashed are lost already")

        # Both at once: one waits for the disk, the other for the processor.
        with data.open("rb") as f, ThreadPoolExecutor(1) as beside:
            if hashes is None:
                hashing = beside.submit(digest, data, blob.startswith("git-"), between)
            else:
                hashing = beside.submit(compare, data, blob, size_bytes, hashes, between)
            try:
                os.fsync(f.fileno())
            except OSError as e:
                failed.set()
                # Final: the next fsync would say that all is well, and the bytes are gone.
                raise Corrupt(
                    f"the disk could not keep the bytes of {blob[:16]}… ({e.strerror}); "
                    "they are discarded and fetched again"
                ) from None
            found = hashing.result()
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
        self.require_root(blob)
        lay = self.layout
        source, target = lay.partial(blob), lay.blob(digests.sha256)
        here = blob_stamp(lay, target)
        # If a proven one is here, it stays: views hold on to that very file.
        if here is None or not here.proven or here.size_bytes != digests.size_bytes:
            target = lay.blob_in(lay.where.get(blob, ""), digests.sha256)
            self._name(source / "data", target, digests)
            self.place(digests.sha256, lay.where.get(blob, ""))
            sync(source)
        # If it was here too: a first attempt may have failed, or been killed, just before this.
        sync(target.parent)
        # Good bytes have come in the place of corrupt ones: those taught all that they could.
        self.drop_set_aside(digests.sha256)
        self.remove(source)
        self._unlink_partial(blob)
        if blob != digests.sha256:
            lay.place(blob, "")

    def place(self, blob: str, further: str) -> None:
        """A blob is, or is to come, in this root; "": the store. What was set aside of it elsewhere is of no use."""
        if self.layout.where.get(blob, "") != further:
            self.drop_set_aside(blob)
            self.layout.place(blob, further)

    def _name(self, data: Path, target: Path, digests: Digests) -> None:
        found = data.stat()
        if found.st_mtime_ns != digests.mtime_ns and not proven(digests.sha256, found):
            raise Unavailable(f"somebody wrote to {digests.sha256[:16]}… after it was verified; try again")
        try:
            data.chmod(PROVEN_MODE)
            prove(digests.sha256, data)
            leaves.write(self.layout, digests.sha256, digests.leaves, data.stat().st_mtime_ns)
            make_directory(target.parent, self.layout.holding(target).root)
            data.replace(target)
        except OSError:
            data.chmod(PARTIAL_MODE)  # it is a partial still, and may be written to
            raise

    def drop_set_aside(self, sha256: str) -> None:
        """Remove what is in quarantine of a blob, durably: its bitmap must not come back beside other bytes."""
        for _, root in self.layout.all():
            files = [p for p in (Layout.set_aside(root, sha256), Layout.set_aside_have(root, sha256)) if p.exists()]
            for path in files:
                path.unlink(missing_ok=True)
            if files:
                sync(root.quarantine)

    def remove_blob(self, sha256: str) -> None:
        """Remove a blob, durably, wherever it is. Absent already is fine."""
        known = self.layout.where.get(sha256, "")
        for further, _ in self.layout.all():
            if further == known or self._is_proven_in(further, sha256):
                self.remove_copy(sha256, further)
        leaves.remove(self.layout, sha256)

    def _is_proven_in(self, further: str, sha256: str) -> bool:
        with suppress(OSError):
            return proven(sha256, self.layout.blob_in(further, sha256).lstat())
        return False

    def remove_copy(self, sha256: str, further: str) -> None:
        """Remove a blob's file from one root, durably. Absent already is fine."""
        path = self.layout.blob_in(further, sha256)
        path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            sync(path.parent)  # if it was absent too: a first attempt may have failed at this
        with suppress(OSError):  # other blobs live there
            path.parent.rmdir()

    def gone(self, blobs: Iterable[str]) -> list[str]:
        """Those of the blobs whose files are not where they were."""
        return [sha256 for sha256 in blobs if not self.layout.blob(sha256).exists()]

    def lost(self, manifest: Manifest) -> list[str]:
        """Blobs of a manifest that are not on the disk, or other files than were proven, whatever the ledger says."""
        return [blob for blob, size_bytes in manifest.blob_sizes.items() if not self._is_here(blob, size_bytes)]

    def _is_here(self, sha256: str, size_bytes: int) -> bool:
        """Whether a blob is in the store, or in a read-only root and still as it was."""
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
        write_file(path, encode(manifest))

    def build_view(self, manifest: Manifest) -> None:
        """Link every file of a model into its view. Raises OSError, also when the store has gone."""
        if self._root_fd is not None and not self.is_there():
            raise FileNotFoundError(errno.ENOENT, "the store has gone", str(self.layout.root))
        build_view(self.layout, manifest)

    def entomb(self, repo: str, commit: str) -> None:
        """Put a model's manifest into tombs/: the model is not here any more, and `clear` removes the rest of it.

        Raises OSError, or Unavailable for a store that is away, while nothing of it has gone. What is absent already
        is fine.
        """
        self.require_there()
        with suppress(FileNotFoundError):
            self.layout.manifest(repo, commit).replace(self.layout.tomb(repo, commit))

    def clear(self, repo: str, commit: str, blobs: Iterable[str]) -> None:
        """Remove what is left of a model without a manifest, with blobs that only it needs.

        What is absent already is fine. After an OSError its tomb is there, and it is to be called again.
        """
        path, view, tomb = (of(repo, commit) for of in (self.layout.manifest, self.layout.view, self.layout.tomb))
        # If it was absent too: a first attempt may have failed at this.
        sync(self.layout.tombs)
        with suppress(FileNotFoundError):
            sync(path.parent)
        remove_view(view, decoded_tomb(tomb))
        for empty in (path.parent, view.parent):
            with suppress(OSError):  # another commit of the model lives there
                empty.rmdir()
        for sha256 in blobs:
            self.remove_blob(sha256)
        # Durably too: a tomb that came back would take blobs with it that have been fetched anew.
        tomb.unlink(missing_ok=True)
        sync(self.layout.tombs)

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

    def remove(self, path: Path) -> None:
        """Remove a file or a directory with all that is in it, atomically out of sight first."""
        if path.is_dir() and not path.is_symlink():
            tomb = path
            tombs = self.layout.holding(path).tombs
            if path.parent != tombs:
                tomb = tombs / f"{os.urandom(6).hex()}-{path.name[:80]}"
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


def decoded_tomb(tomb: Path) -> Manifest | None:
    """The manifest in tombs/ of a model whose deletion has begun; None when it says nothing."""
    with suppress(ShoalError, OSError):
        return decode(tomb.read_bytes(), Manifest)
    return None
