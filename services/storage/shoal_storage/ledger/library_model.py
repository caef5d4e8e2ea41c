"""A model of a library, and what was verified of its files."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shoal_common.messages import Message
from shoal_common.messages.manifest import Manifest


class Verified(Message):
    """A file's hash and its stat when hashed. `corrupt`: hashed again later, it gave another hash."""

    seen: Seen
    sha256: str
    git_sha1: str = ""
    rotten: bool = False


class Seen(msgspec.Struct, frozen=True):
    """A file's stat: while it is unchanged, so are the bytes. `inode` 0: not compared."""

    size_bytes: int
    mtime_ns: int
    inode: int


class File(msgspec.Struct, frozen=True):
    """A file of a model: `path` in the model, its absolute path, and the hash it should have.

    `expected_hash` is a sha256, `git-<sha1>`, or "" if nothing names a hash.
    """

    path: str
    at: str
    seen: Seen
    expected: str = ""


class Adopted(msgspec.Struct, frozen=True):
    """A library model with every file hashed, and where the files are."""

    manifest: Manifest
    root: str
    directory: str
    files: Mapping[str, File]
    """By path in the model."""
    git: Mapping[str, str]
    """sha256 by `git-<sha1>`, for files with both hashes known."""
