"""A further root on its disk: made, opened, found there or not. Blocking: for threads.

    <root>/VERSION      `further 1 <id>`, 16 hexadecimal digits; written last of all when a root is made
    <root>/lock         held by the storage that uses it, and says which that is
    <root>/reserve, blobs/sha256/, partial/, tombs/, quarantine/    as in a store
    <store>/further/<id>    symbolic link to the root; durable before anything comes to the root

A store that remembers a root by its path takes only the root with that id for it: an empty mount point, or another
disk that is mounted there, is none. Only a path that the store does not remember is made a root, and never on a file
system that the store or another root is on: what an unmounted disk leaves is most often that.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shoal_common.blobs import further_roots
from shoal_common.errors import BadInput, ShoalError, Unsupported
from shoal_common.filesystem import LYING_LOCKS, kind_of, mounts
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.proof import prove
from shoal_storage.durable import make_directory, sync, write_file
from shoal_storage.locking import take_lock
from shoal_storage.reserve import ReserveFile
from shoal_storage.roots import real_root

log = Log("further")

FURTHER_VERSION = "1"
_VERSION = re.compile(r"further (\d+) ([0-9a-f]{16})")
_ID_BYTES = 8


class Away(Exception):
    """A root is not where it should be; the message says what is there instead."""


class FurtherRoot:
    """One that is open: nobody else uses it while it is."""

    def __init__(self, path: Path, identity: str, lock: BinaryIO, reserve_bytes: int) -> None:
        self.path, self.id = path, identity
        self.layout = Layout(path)
        self.reserve = ReserveFile(self.layout.reserve, reserve_bytes)
        self._lock = lock
        self._fd = os.open(path, os.O_RDONLY)
        self._closing = weakref.finalize(self, os.close, self._fd)

    def close(self) -> None:
        """Give it up, so that its disk can be unmounted and somebody else can open it."""
        self._lock.close()
        self._closing()

    def is_there(self) -> bool:
        """Whether the root that was opened is still found at its path."""
        try:
            same = os.path.samestat(os.fstat(self._fd), self.path.stat())
            return same and _identity(self.layout) == self.id and self.layout.blobs.is_dir()
        except (OSError, ShoalError):
            return False

    @property
    def device(self) -> int:
        """The number of its file system, as long as that is mounted."""
        return os.fstat(self._fd).st_dev

    def free_bytes(self) -> int:
        """Bytes that its file system would give us now. Raises OSError."""
        s = os.statvfs(self._fd)
        return s.f_bavail * s.f_frsize


def open_root(
    store: Layout, path: Path, reserve_bytes: int = 0, others: Iterable[tuple[str, Path]] = ()
) -> FurtherRoot:
    """Open a further root of a store; make it, if the store does not remember it and none is there.

    None is made on a file system where one of `others` is. Raises Away; Claimed with the holder; Unsupported,
    BadInput for what can be no further root; OSError.
    """
    remembered = next((identity for identity, its in further_roots(store) if its == path), "")
    lay = Layout(path)
    found = _identity(lay)
    if remembered and found != remembered:
        raise Away(
            f"another further root is mounted there, {found}: take it out of the settings and add it again"
            if found
            else "it is not there: mount its disk"
        )
    _refuse_unfit(path)
    if not found:
        refuse_same_disk(path, others)
    if not path.exists() and path.parent.is_dir():
        path.mkdir()
        sync(path.parent)
    lock = take_lock(lay.lock, f"the further root at {path}", f"the store at {store.root}, pid {os.getpid()}")
    try:
        if not prove("0" * 64, lay.lock):
            raise Unsupported(
                f"the file system of {path} keeps no nanoseconds of a file's time, by which a blob shows that it was "
                "verified: give a directory on another disk"
            )
        for directory in (lay.blobs, lay.partials, lay.tombs, lay.quarantine):
            make_directory(directory)
        if not found:
            found = os.urandom(_ID_BYTES).hex()
            write_file(lay.version, f"further {FURTHER_VERSION} {found}".encode())
        root = FurtherRoot(path, found, lock, reserve_bytes)
        root.reserve.look()
        return root
    except BaseException:
        lock.close()
        raise


def remember(store: Layout, root: FurtherRoot) -> None:
    """Note where a root is, durably: from then on nothing else at its path is taken for it."""
    link = store.further / root.id
    with suppress(OSError):
        if link.readlink() == root.path:
            return
    make_directory(store.further)
    link.unlink(missing_ok=True)
    link.symlink_to(root.path)
    sync(store.further)


def forget_others(store: Layout, kept: Iterable[Path]) -> None:
    """Remember no root but those at these paths."""
    paths = set(kept)
    for identity, path in further_roots(store):
        if path not in paths:
            (store.further / identity).unlink(missing_ok=True)
            sync(store.further)


def refuse_overlap(roots: Iterable[str], read_only: Iterable[str], store: Path) -> None:
    """Raise BadInput for a further root in the store or in another root, or around one."""
    others = [(f"the store at {store}", Path(os.path.realpath(store)))]
    others += [(f"the read-only root {root}", real_root(root)) for root in read_only]
    for root in roots:
        real = real_root(root)
        for name, other in others:
            if real.is_relative_to(other) or other.is_relative_to(real):
                raise BadInput(
                    f"the further root {root} and {name} are one in the other: give another directory", param="roots"
                )
        others.append((f"the further root {root}", real))


def refuse_same_disk(path: Path, others: Iterable[tuple[str, Path]]) -> None:
    """Raise BadInput for a root on a file system that is used already. `others`: what each is called, and where."""
    device = (path if path.exists() else path.parent).stat().st_dev
    for name, other in others:
        with suppress(OSError):  # one that is away is on no file system of these
            if other.stat().st_dev == device:
                raise BadInput(
                    f"{path} is on the same file system as {name}, so it would add no room: mount its disk first, or "
                    "give a directory on another one",
                    param="roots",
                )


def _refuse_unfit(path: Path) -> None:
    if not path.is_dir() and not path.parent.is_dir():
        raise BadInput(f"{path} is no directory, nor is {path.parent}: mount its disk, or make it", param="roots")
    kind = kind_of(path, mounts())
    if kind in LYING_LOCKS:
        raise Unsupported(
            f"{path} is on {kind}, where locks do not hold between machines and two nodes could write it: give a "
            "directory on a disk of this machine"
        )


def _identity(lay: Layout) -> str:
    """The id of the further root that is there; "" when none is. Raises BadInput, Unsupported for another thing."""
    try:
        said = lay.version.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    match = _VERSION.fullmatch(said)
    if match is None:
        raise BadInput(
            f"{lay.root} is a store, or something else with a VERSION ({said[:40]!r}), and no further root: give an "
            "empty directory, or offer it with read_only_roots",
            param="roots",
        )
    if match.group(1) != FURTHER_VERSION:
        raise Unsupported(f"the further root at {lay.root} has format {match.group(1)}: update Shoal")
    return match.group(2)
