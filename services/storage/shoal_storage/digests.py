"""Hashing a file: what a blob is called, whether it still is what it is called, and what its leaves hash to."""

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

from shoal_common.layout import LEAF_BYTES
from shoal_common.leaves import HASH_BYTES, leaf_hash

_AT_ONCE = min(os.cpu_count() or 1, 4)
"""Leaves that are compared with a list at the same time: more wait for the disk."""


class Digests(msgspec.Struct, frozen=True):
    """What a file's bytes hash to, and the mtime that it had when they were read."""

    sha256: str
    git_sha1: str
    size_bytes: int
    leaves: bytes
    """BLAKE3 of each leaf, one after the other."""
    mtime_ns: int


def digest(path: Path, with_git: bool, between: Callable[[], None]) -> Digests:
    """Hash a whole file. `between` is called before each leaf is hashed, and may raise to end this."""
    with FileIO(path) as f:
        return digest_of(f, with_git, between)


def digest_of(f: FileIO, with_git: bool, between: Callable[[], None]) -> Digests:
    """Hash an open file in one pass, a leaf at a time (larger buffers fall out of the cache and are slower)."""
    sha256, git, leaves, done = hashlib.sha256(), hashlib.sha1(usedforsecurity=False), bytearray(), 0
    found = os.fstat(f.fileno())
    git.update(b"blob %d\0" % found.st_size)
    with closing(hashed_ahead(_leaves_of(f.fileno()))) as hashed:
        for leaf, its_hash in hashed:
            between()
            sha256.update(leaf)
            if with_git:
                git.update(leaf)
            leaves += its_hash
            done += len(leaf)
    return Digests(
        sha256=sha256.hexdigest(),
        git_sha1=git.hexdigest() if with_git else "",
        size_bytes=done,
        leaves=bytes(leaves),
        mtime_ns=found.st_mtime_ns,
    )


def hashed_ahead(leaves: Iterator[bytes]) -> Generator[tuple[bytes, bytes]]:
    """Leaves with their BLAKE3. The next one is read and hashed in a thread while the caller works on this one.

    Close it: that waits for the leaf in hand.
    """

    def take() -> tuple[bytes, bytes] | None:
        for leaf in leaves:
            return leaf, leaf_hash(leaf)
        return None

    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(take)
        while (found := coming.result()) is not None:
            coming = ahead.submit(take)
            yield found


def _leaves_of(fd: int) -> Iterator[bytes]:
    at_byte = 0
    while leaf := os.pread(fd, LEAF_BYTES, at_byte):
        # A read that a signal has cut short is no leaf yet.
        while len(leaf) < LEAF_BYTES and (more := os.pread(fd, LEAF_BYTES - len(leaf), at_byte + len(leaf))):
            leaf += more
        yield leaf
        at_byte += len(leaf)


def unlike(f: FileIO, hashes: bytes, between: Callable[[], None]) -> list[int]:
    """The leaves of an open file that do not hash to what a list says of them, in order.

    Several threads hash at once: BLAKE3 by leaf needs no order. `between` is called before each leaf, and may raise.
    """
    turns, taking = iter(range(len(hashes) // HASH_BYTES)), threading.Lock()

    def work() -> list[int]:
        bad: list[int] = []
        buffer = memoryview(bytearray(LEAF_BYTES))
        while True:
            with taking:
                leaf = next(turns, None)
            if leaf is None:
                return bad
            between()
            found = buffer[: _read_into(f.fileno(), buffer, leaf * LEAF_BYTES)]
            if leaf_hash(found) != hashes[leaf * HASH_BYTES : (leaf + 1) * HASH_BYTES]:
                bad.append(leaf)

    with ThreadPoolExecutor(_AT_ONCE) as workers:
        works = [workers.submit(work) for _ in range(_AT_ONCE)]
        return sorted(leaf for done in works for leaf in done.result())


def _read_into(fd: int, buffer: memoryview, at_byte: int) -> int:
    done = 0
    while done < len(buffer) and (count := os.preadv(fd, [buffer[done:]], at_byte + done)):
        done += count
    return done
