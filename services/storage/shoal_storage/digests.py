"""Hashing a file: what a blob is called, and whether it still is what it is called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import msgspec

_CHUNK_BYTES = 1 << 20


class Digests(msgspec.Struct, frozen=True):
    """What a file's bytes hash to."""

    sha256: str
    git_sha1: str
    size_bytes: int


def digest(path: Path, with_git: bool, between: Callable[[], None]) -> Digests:
    """Hash a whole file. `between` is called before each chunk is hashed, and may raise to end this."""
    with FileIO(path) as f:
        return digest_of(f, path.stat().st_size, with_git, between)


def digest_of(f: FileIO, size_bytes: int, with_git: bool, between: Callable[[], None]) -> Digests:
    """Hash an open file, 1 MiB at a time (larger buffers fall out of the cache and are slower)."""
    sha256, git, done = hashlib.sha256(), hashlib.sha1(usedforsecurity=False), 0
    git.update(b"blob %d\0" % size_bytes)
    while chunk := f.read(_CHUNK_BYTES):
        between()
        sha256.update(chunk)
        if with_git:
            git.update(chunk)
        done += len(chunk)
    return Digests(sha256=sha256.hexdigest(), git_sha1=git.hexdigest() if with_git else "", size_bytes=done)
