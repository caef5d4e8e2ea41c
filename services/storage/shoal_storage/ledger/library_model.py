"""The models of libraries, and what was verified of their files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from shoal_common.messages import WireStruct
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelId
from shoal_storage.ledger.entries import replace_entries


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


def blob_files(models: Mapping[ModelId, LibraryModel]) -> dict[str, LibraryFile]:
    """Return the blobs of these models, by sha256, each with one file that has its bytes."""
    files: dict[str, LibraryFile] = {}
    for _, model in sorted(models.items()):
        for f in model.manifest.files:
            files.setdefault(f.sha256, model.files[f.path])
    return files


class LibraryModels:
    """The models of all libraries. Present, but not part of the store: no quota, never garbage, never victims."""

    models: Final[Mapping[ModelId, LibraryModel]]
    """By `org/name@commit`."""
    blobs: Final[Mapping[str, LibraryFile]]
    """Their blobs, by sha256, each with one file that has its bytes."""
    sha256_by_git_name: Final[Mapping[str, str]]
    """The sha256 of blobs with both hashes known: `git-<sha1>` to sha256."""

    def __init__(self) -> None:
        self.models = self._models = dict[ModelId, LibraryModel]()
        self.blobs = self._blobs = dict[str, LibraryFile]()
        self.sha256_by_git_name = self._sha256_by_git_name = dict[str, str]()

    def set_models(self, models: Mapping[ModelId, LibraryModel]) -> None:
        """Set the models, replacing all earlier ones."""
        sha256_by_git_name = dict[str, str]()
        for _, model in sorted(models.items()):
            sha256_by_git_name.update(model.sha256_by_git_name)
        replace_entries(self._blobs, blob_files(models))
        replace_entries(self._models, models)
        replace_entries(self._sha256_by_git_name, sha256_by_git_name)

    def mark_missing(self, blob: str) -> None:
        """Drop a blob whose file is gone, until the next scan of its library."""
        self._blobs.pop(blob, None)
