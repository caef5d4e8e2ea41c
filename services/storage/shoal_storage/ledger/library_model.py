"""A model of a library, and what was verified of its files."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shoal_common.messages import WireStruct
from shoal_common.messages.manifest import Manifest


class VerifiedFile(WireStruct):
    """A file's hash and its stat when hashed. `corrupt`: hashed again later, it gave another hash."""

    stat: FileStat
    sha256: str
    git_sha1: str = ""
    corrupt: bool = False


class FileStat(msgspec.Struct, frozen=True):
    """A file's stat: while it is unchanged, so are the bytes. `inode` 0: not compared."""

    size_bytes: int
    mtime_ns: int
    inode: int


class LibraryFile(msgspec.Struct, frozen=True):
    """A file of a model: `path` in the model, its absolute path, and the hash it should have.

    `expected_hash` is a sha256, `git-<sha1>`, or "" if nothing names a hash.
    """

    path: str
    absolute_path: str
    stat: FileStat
    expected_hash: str = ""


class LibraryModel(msgspec.Struct, frozen=True):
    """A library model with every file hashed, and where the files are."""

    manifest: Manifest
    library: str
    directory: str
    files: Mapping[str, LibraryFile]
    """By path in the model."""
    sha256_by_git_name: Mapping[str, str]
    """sha256 by `git-<sha1>`, for files with both hashes known."""
