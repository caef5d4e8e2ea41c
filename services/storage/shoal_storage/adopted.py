"""A model in a read-only root, as the ledger holds it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from shoal_common.messages.records import Manifest


class Seen(msgspec.Struct, frozen=True):
    """A file as stat shows it: while this is the same, its bytes are taken to be. `inode` 0: not to be compared."""

    size_bytes: int
    mtime_ns: int
    inode: int


class File(msgspec.Struct, frozen=True):
    """A file of a model, where it is, and what it has to hash to: a sha256, `git-<sha1>`, or "" when nobody says."""

    path: str
    at: str
    seen: Seen
    expected: str = ""


class Adopted(msgspec.Struct, frozen=True):
    """A model whose every file has been hashed, and where the files are."""

    manifest: Manifest
    root: str
    directory: str
    files: Mapping[str, File]
    """By path in the model."""
    git: Mapping[str, str]
    """sha256 by `git-<sha1>`, of those files of which both are known."""
