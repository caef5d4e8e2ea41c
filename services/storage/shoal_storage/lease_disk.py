"""Leases on the disk: a directory for each, with a lock that the kernel lets go of when its holder dies. Blocking.

    leases/<id>/lease.json   who holds it, since when, and which blobs are under which path
    leases/<id>/lock         the holder keeps a shared flock on it; who can take an exclusive one finds it dead
    leases/<id>/view/…       the holder's own view

One is made under a name that starts with a dot, and renamed when it is whole; one that ends is renamed into tombs/
while its lock is taken, so that nobody takes it up meanwhile. A start removes the unfinished and the dead. Nothing is
made durable: after a power cut no holder is left.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal_common.errors import BadName, ShoalError
from shoal_common.layout import Layout
from shoal_common.logs import Log
from shoal_common.messages import Message, decode, encode
from shoal_common.names import check_blob, check_file_path, check_id
from shoal_storage.disk import Disk
from shoal_storage.leases import Lease, grace_left_s
from shoal_storage.views import build

log = Log("leases")

_UNFINISHED = ".new"
_LOCKS = Path("/proc/locks")
_HELD = re.compile(r"^\d+: FLOCK +\S+ +\S+ +(\d+) +([0-9a-f]+):([0-9a-f]+):(\d+) ", re.MULTILINE)


class LeaseFile(Message):
    """`leases/<id>/lease.json`."""

    model: str
    holder: str
    since_s: float
    files: dict[str, str]
    instance: str = ""


def make(disk: Disk, lease: Lease) -> None:
    """Make a lease's directory, whole or not at all. Raises OSError."""
    lay = disk.layout
    made = lay.lease(lease.id)
    unfinished = made.with_name(f".{lease.id}{_UNFINISHED}")
    lay.leases.mkdir(exist_ok=True)  # removed by hand while we ran
    unfinished.mkdir()
    try:
        build(lay, lease.files, unfinished / lay.lease_view(lease.id).name, lease.arriving)
        (unfinished / lay.lease_lock(lease.id).name).touch()
        record = LeaseFile(
            model=lease.model, holder=lease.holder, since_s=lease.since_s, files=lease.files, instance=lease.instance
        )
        (unfinished / "lease.json").write_bytes(encode(record))
        unfinished.rename(made)
    except BaseException:
        with suppress(OSError):
            disk.remove(unfinished)
        raise


@contextmanager
def _dead(lay: Layout, lease: str) -> Iterator[bool]:
    """Whether nobody holds a lease's lock; if so, nobody can take it either while the body runs."""
    try:
        fd = os.open(lay.lease_lock(lease), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def is_held(lay: Layout, lease: str) -> bool:
    """Whether somebody holds a lease's lock now. What cannot be found out counts as held."""
    try:
        with _dead(lay, lease) as dead:
            return not dead
    except OSError as e:
        log.warning("whether a lease is held cannot be seen; it counts as held", lease=lease, why=e.strerror)
        return True


def remove(disk: Disk, lease: str) -> bool:
    """Remove a lease that nobody holds. False: somebody does. Absent already is fine."""
    directory = disk.layout.lease(lease)
    with _dead(disk.layout, lease) as dead:
        if dead:
            disk.remove(directory)
        return dead


def look(lay: Layout, leases: list[str]) -> dict[str, tuple[bool, int]]:
    """Whether each lease is held, and by which process; 0 where the system does not say (macOS never does)."""
    pids = _lockers()
    found: dict[str, tuple[bool, int]] = {}
    for lease in leases:
        held, pid = is_held(lay, lease), 0
        if held:
            with suppress(OSError):
                lock = lay.lease_lock(lease).stat()
                pid = pids.get((lock.st_ino, os.major(lock.st_dev), os.minor(lock.st_dev)), 0)
        found[lease] = held, pid
    return found


def _lockers() -> dict[tuple[int, int, int], int]:
    """Living processes that have taken a flock, by the file's inode and its device, major and minor."""
    found: dict[tuple[int, int, int], int] = {}
    with suppress(OSError):
        for pid, major, minor, inode in _HELD.findall(_LOCKS.read_text()):
            # It may have taken the lock for somebody else and ended, as flock(1) in a script does.
            if Path(f"/proc/{pid}").exists():
                found[int(inode), int(major, 16), int(minor, 16)] = int(pid)
    return found


def read(disk: Disk, now_s: float, clock_s: float) -> dict[str, Lease]:
    """At start: the leases that live, or still may be taken up. The others, and unfinished ones, are removed.

    `now_s` is of the clock that leases are looked at with, `clock_s` counts from 1970.
    """
    found: dict[str, Lease] = {}
    for directory in sorted(disk.layout.leases.iterdir()):
        if directory.name.startswith(".") and directory.name.endswith(_UNFINISHED):
            disk.remove(directory)
            continue
        try:
            name = check_id(directory.name)
        except BadName:
            log.warning("not a lease; left alone", path=directory)
            continue
        lease, held = _read_one(directory, name), is_held(disk.layout, name)
        if lease is None:
            if not remove(disk, name):
                log.warning(
                    "a lease that somebody holds cannot be read; its model is not kept for it", path=directory
                )
            continue
        lease.held = held
        lease.grace_until_s = now_s + grace_left_s(lease.since_s, clock_s)
        if held or lease.grace_until_s > now_s or not remove(disk, name):
            found[name] = lease
    return found


def _read_one(directory: Path, name: str) -> Lease | None:
    try:
        record = decode((directory / "lease.json").read_bytes(), LeaseFile)
        for path, blob in record.files.items():
            check_file_path(path)
            check_blob(blob)
    except (ShoalError, OSError):
        return None
    return Lease(name, record.model, record.holder, record.instance, record.since_s, record.files, 0.0)
