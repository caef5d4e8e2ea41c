"""Leases on disk: one directory each, with a lock that the kernel releases when its holder dies. Blocking.

    leases/<id>/lease.json   holder, start time, and the blob under each path
    leases/<id>/lock         the holder keeps a shared flock on it; an exclusive flock succeeds only if it has ended
    leases/<id>/view/…       the holder's own view

A lease is made under a name that starts with a dot and renamed when complete. An ended lease is renamed into tombs/
while its lock is held exclusively, so that nobody can take it up meanwhile. Startup removes unfinished and dead
leases. Nothing is made durable: after a power cut no holder is left.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec import structs

from shoal_common.errors import BadName, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages import WireStruct, decode, encode
from shoal_common.names import ModelId, check_blob, check_file_path, check_id
from shoal_common.store.store_paths import StorePaths
from shoal_storage.ledger.lease import ModelLease, grace_left_s
from shoal_storage.store.store import Store
from shoal_storage.store.views import link_files

log = StructuredLogger("leases")

_UNFINISHED = ".new"
_LOCKS = Path("/proc/locks")
_HELD = re.compile(r"^\d+: FLOCK +\S+ +\S+ +(\d+) +([0-9a-f]+):([0-9a-f]+):(\d+) ", re.MULTILINE)


class LeaseFile(WireStruct):
    """`leases/<id>/lease.json`."""

    model: ModelId
    holder: str
    since_s: float
    files: dict[str, str]
    instance: str = ""


def create_lease(store: Store, lease: ModelLease) -> None:
    """Create a lease's directory, complete or not at all. Raises OSError."""
    paths = store.layout
    directory = paths.lease(lease.id)
    unfinished = directory.with_name(f".{lease.id}{_UNFINISHED}")
    paths.leases.mkdir(exist_ok=True)  # it may have been deleted by hand
    unfinished.mkdir()
    try:
        link_files(paths, lease.files, unfinished / paths.lease_view(lease.id).name, lease.partial_blobs)
        (unfinished / paths.lease_lock(lease.id).name).touch()
        record = LeaseFile(
            model=lease.model,
            holder=lease.holder,
            since_s=lease.since_s,
            files=dict(lease.files),
            instance=lease.instance,
        )
        (unfinished / "lease.json").write_bytes(encode(record))
        unfinished.rename(directory)
    except BaseException:
        with suppress(OSError):
            store.delete(unfinished)
        raise


@contextmanager
def _lock_if_dead(paths: StorePaths, lease_id: str) -> Iterator[bool]:
    """Yield whether nobody holds a lease's lock; if so, nobody can take it while the body runs."""
    try:
        fd = os.open(paths.lease_lock(lease_id), os.O_RDONLY | os.O_CLOEXEC)
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


def is_held(paths: StorePaths, lease_id: str) -> bool:
    """Return whether a lease's lock is held now; True if that cannot be determined."""
    try:
        with _lock_if_dead(paths, lease_id) as dead:
            return not dead
    except OSError as e:
        log.warning("cannot tell whether a lease is held; treating it as held", lease=lease_id, error=e.strerror)
        return True


def remove_unless_held(store: Store, lease_id: str) -> bool:
    """Remove a lease unless it is held; return False if it is. An absent lease is fine."""
    directory = store.layout.lease(lease_id)
    with _lock_if_dead(store.layout, lease_id) as dead:
        if dead:
            store.delete(directory)
        return dead


def check_locks(paths: StorePaths, lease_ids: list[str]) -> dict[str, tuple[bool, int]]:
    """Return whether each lease is held, and by which pid; 0 where the system does not tell (macOS never does)."""
    pids = _flock_holders()
    status: dict[str, tuple[bool, int]] = {}
    for lease_id in lease_ids:
        held, pid = is_held(paths, lease_id), 0
        if held:
            with suppress(OSError):
                lock = paths.lease_lock(lease_id).stat()
                pid = pids.get((lock.st_ino, os.major(lock.st_dev), os.minor(lock.st_dev)), 0)
        status[lease_id] = held, pid
    return status


def _flock_holders() -> dict[tuple[int, int, int], int]:
    """Return the pids of live processes that took a flock, by the file's inode, device major and device minor."""
    pids: dict[tuple[int, int, int], int] = {}
    with suppress(OSError):
        for pid, major, minor, inode in _HELD.findall(_LOCKS.read_text()):
            # A process may take a lock for another one and exit, as flock(1) in a script does.
            if Path(f"/proc/{pid}").exists():
                pids[int(inode), int(major, 16), int(minor, 16)] = int(pid)
    return pids


def read_leases(store: Store, now_s: float, clock_s: float) -> dict[str, ModelLease]:
    """Return the leases that are held or may still be taken up; remove all others, unfinished ones too.

    `now_s` is monotonic time, `clock_s` is seconds since 1970.
    """
    leases: dict[str, ModelLease] = {}
    for directory in sorted(store.layout.leases.iterdir()):
        if directory.name.startswith(".") and directory.name.endswith(_UNFINISHED):
            store.delete(directory)
            continue
        try:
            name = check_id(directory.name)
        except BadName:
            log.warning("foreign file among the leases; left alone", path=directory)
            continue
        lease, held = _read_one(directory, name), is_held(store.layout, name)
        if lease is None:
            if not remove_unless_held(store, name):
                log.warning("held lease is unreadable; its model is not protected", path=directory)
            continue
        grace_until_s = now_s + grace_left_s(lease.since_s, clock_s)
        lease = structs.replace(lease, held=held, grace_until_s=grace_until_s)
        if held or lease.grace_until_s > now_s or not remove_unless_held(store, name):
            leases[name] = lease
    return leases


def _read_one(directory: Path, name: str) -> ModelLease | None:
    try:
        record = decode((directory / "lease.json").read_bytes(), LeaseFile)
        for path, blob in record.files.items():
            check_file_path(path)
            check_blob(blob)
    except (ShoalError, OSError):
        return None
    return ModelLease(name, record.model, record.holder, record.instance, record.since_s, record.files, 0.0)
