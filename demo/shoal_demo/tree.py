"""Repositories on the disk as the hub shows them: commits, listings and hashes.

A repository is the directory `<root>/<org>/<name>`; it has one revision, `main`, whose commit is a digest of its
content. Everything here is blocking and is meant for a worker thread.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_demo.names import DEFAULT_REVISION, is_model

HASH_CHUNK_BYTES = 1 << 20
# Left out of a listing, whatever they hold: bookkeeping of version control and of download clients.
_HIDDEN = frozenset({".git", ".cache", "__pycache__"})


@dataclass(frozen=True)
class Entry:
    """One file of a repository."""

    path: str
    size_bytes: int
    git_oid: str
    sha256: str
    is_lfs: bool
    pointer_size_bytes: int
    disk_path: Path

    @property
    def etag(self) -> str:
        """What names these bytes to clients: sha256 for large files, the git blob sha1 for small ones."""
        return self.sha256 if self.is_lfs else self.git_oid

    def as_tree_item(self) -> dict[str, Any]:
        """The file in the form of the tree API."""
        item: dict[str, Any] = {
            "type": "file",
            "oid": self.git_oid,
            "size": self.size_bytes,
            "path": self.path,
        }
        if self.is_lfs:
            item["lfs"] = {
                "oid": self.sha256,
                "size": self.size_bytes,
                "pointerSize": self.pointer_size_bytes,
            }
        return item

    def as_sibling(self, with_blobs: bool) -> dict[str, Any]:
        """The file in the form of the model API, with sizes and hashes when they were asked for."""
        sibling: dict[str, Any] = {"rfilename": self.path}
        if with_blobs:
            sibling |= {"size": self.size_bytes, "blobId": self.git_oid}
            if self.is_lfs:
                sibling["lfs"] = {
                    "sha256": self.sha256,
                    "size": self.size_bytes,
                    "pointerSize": self.pointer_size_bytes,
                }
        return sibling


@dataclass(frozen=True)
class Repository:
    """A model at its only commit."""

    model: str
    commit: str
    entries: dict[str, Entry]

    def has_revision(self, revision: str) -> bool:
        """True for `main` and for the commit itself."""
        return revision in (DEFAULT_REVISION, self.commit)

    def list_tree(self, folder: str, recursive: bool) -> list[dict[str, Any]] | None:
        """Items under `folder` in path order; None when there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        files = [entry for entry in self.entries.values() if entry.path.startswith(prefix)]
        if not files and folder:
            return None
        items: dict[str, dict[str, Any]] = {}
        for entry in files:
            parts = entry.path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                path = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(f"{self.commit} {path}".encode()).hexdigest()
                items.setdefault(path, {"type": "directory", "oid": oid, "size": 0, "path": path})
            if recursive or len(parts) == 1:
                items[entry.path] = entry.as_tree_item()
        return [items[path] for path in sorted(items)]


def _hash_file(path: Path, size_bytes: int) -> tuple[str, str]:
    """(git blob sha1, sha256) of a file, in one pass."""
    git_sha1 = hashlib.sha1(f"blob {size_bytes}\0".encode())
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            git_sha1.update(chunk)
            sha256.update(chunk)
    return git_sha1.hexdigest(), sha256.hexdigest()


class Store:
    """The repositories under one root. Each file is hashed once for each (path, mtime, size). Not thread-safe."""

    def __init__(self, root: Path, lfs_from_bytes: int) -> None:
        self._root = root
        self._lfs_from_bytes = lfs_from_bytes
        self._hashes: dict[Path, tuple[tuple[int, int], tuple[str, str]]] = {}

    def models(self) -> list[str]:
        """Ids of all models, sorted."""
        found = (path.relative_to(self._root).as_posix() for path in self._root.glob("*/*") if path.is_dir())
        return sorted(model for model in found if is_model(model))

    def repository(self, model: str) -> Repository | None:
        """The model as it is on the disk now; None when it is not there."""
        directory = self._root / model
        if not is_model(model) or not directory.is_dir():
            return None
        entries: dict[str, Entry] = {}
        for path in sorted(directory.rglob("*")):
            relative = path.relative_to(directory)
            if _HIDDEN.isdisjoint(relative.parts) and path.is_file():
                entries[relative.as_posix()] = self._entry(relative.as_posix(), path)
        digest = hashlib.sha1()
        for entry in entries.values():
            digest.update(f"{entry.path}\0{entry.size_bytes}\0{entry.sha256}\n".encode())
        return Repository(model, digest.hexdigest(), entries)

    def find_sha256(self, sha256: str, model: str | None, path: str | None) -> tuple[Repository, Entry] | None:
        """A large file by its hash; `model` and `path` say which one when several have the same bytes."""
        for candidate in [model] if model else self.models():
            repository = self.repository(candidate)
            for entry in repository.entries.values() if repository else ():
                if entry.is_lfs and entry.sha256 == sha256 and path in (None, entry.path):
                    assert repository is not None
                    return repository, entry
        return None

    def _entry(self, relative: str, path: Path) -> Entry:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._hashes.get(path)
        if known is None or known[0] != stamp:
            known = (stamp, _hash_file(path, status.st_size))
            self._hashes[path] = known
        git_oid, sha256 = known[1]
        size_bytes = status.st_size
        is_lfs = size_bytes >= self._lfs_from_bytes or relative.endswith(".safetensors")
        pointer = f"oid sha256:{sha256}\nsize {size_bytes}\n".encode() if is_lfs else b""
        if is_lfs:
            # Git holds a short pointer in place of a large file. Clients show its oid and never check it.
            git_oid = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer).hexdigest()
        return Entry(relative, size_bytes, git_oid, sha256, is_lfs, len(pointer), path)
