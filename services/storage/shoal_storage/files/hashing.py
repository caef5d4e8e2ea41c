"""Hashing a file: its sha256, its git sha1, and the hashes of its leaves."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from io import FileIO
from pathlib import Path

import msgspec

from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.leaf_hash import HASH_BYTES, leaf_hash

_MAX_THREADS = min(os.cpu_count() or 1, 4)
"""Threads that compare leaves with a list: with more, they wait for the disk."""


class FileHashes(msgspec.Struct, frozen=True):
    """The hashes of a file's bytes, and its mtime when they were read."""

    sha256: str
    git_sha1: str
    size_bytes: int
    leaf_hashes: bytes
    """BLAKE3 of each leaf, concatenated."""
    mtime_ns: int
    by_leaf_list: bool = False
    """Whether `sha256` follows from a leaf list that another node sealed; it was not computed here."""


def hash_file(path: Path, with_git: bool, on_progress: Callable[[], None]) -> FileHashes:
    """Hash a whole file. `on_progress` is called before each leaf and may raise to stop."""
    with FileIO(path) as f:
        return hash_open_file(f, with_git, on_progress)


def hash_open_file(f: FileIO, with_git: bool, on_progress: Callable[[], None]) -> FileHashes:
    """Hash an open file in one pass, leaf by leaf (larger buffers fall out of the cache and are slower)."""
    sha256, git, leaves, size_bytes = hashlib.sha256(), hashlib.sha1(usedforsecurity=False), bytearray(), 0
    file_stat = os.fstat(f.fileno())
    git.update(b"blob %d\0" % file_stat.st_size)
    with closing(hash_ahead(_leaves_of(f.fileno()))) as hashed:
        for leaf, hash_ in hashed:
            on_progress()
            sha256.update(leaf)
            if with_git:
                git.update(leaf)
            leaves += hash_
            size_bytes += len(leaf)
    return FileHashes(
        sha256=sha256.hexdigest(),
        git_sha1=git.hexdigest() if with_git else "",
        size_bytes=size_bytes,
        leaf_hashes=bytes(leaves),
        mtime_ns=file_stat.st_mtime_ns,
    )


def hash_ahead(leaves: Iterator[bytes]) -> Generator[tuple[bytes, bytes]]:
    """Yield leaves with their BLAKE3. A thread reads and hashes the next leaf while the caller uses this one.

    Close the generator: that waits for the leaf being hashed.
    """

    def take() -> tuple[bytes, bytes] | None:
        for leaf in leaves:
            return leaf, leaf_hash(leaf)
        return None

    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(take)
        while (hashed := future.result()) is not None:
            future = executor.submit(take)
            yield hashed


def _leaves_of(fd: int) -> Iterator[bytes]:
    offset = 0
    while leaf := os.pread(fd, LEAF_BYTES, offset):
        # A signal may cut a read short: read on until the leaf is complete.
        while len(leaf) < LEAF_BYTES and (more := os.pread(fd, LEAF_BYTES - len(leaf), offset + len(leaf))):
            leaf += more
        yield leaf
        offset += len(leaf)


def mismatching_leaves(f: FileIO, hashes: bytes, on_progress: Callable[[], None]) -> list[int]:
    """Return the leaves of an open file that do not match a list of hashes, in order.

    Several threads hash at once: BLAKE3 by leaf needs no order. `on_progress` is called before each leaf and may
    raise.
    """
    pending, lock = iter(range(len(hashes) // HASH_BYTES)), threading.Lock()

    def work() -> list[int]:
        bad: list[int] = []
        buffer = memoryview(bytearray(LEAF_BYTES))
        while True:
            with lock:
                leaf = next(pending, None)
            if leaf is None:
                return bad
            on_progress()
            data = buffer[: _read_into(f.fileno(), buffer, leaf * LEAF_BYTES)]
            if leaf_hash(data) != hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES]:
                bad.append(leaf)

    with ThreadPoolExecutor(_MAX_THREADS) as workers:
        futures = [workers.submit(work) for _ in range(_MAX_THREADS)]
        return sorted(leaf for future in futures for leaf in future.result())


def _read_into(fd: int, buffer: memoryview, offset: int) -> int:
    done = 0
    while done < len(buffer) and (count := os.preadv(fd, [buffer[done:]], offset + done)):
        done += count
    return done
