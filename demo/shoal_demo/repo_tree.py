"""Repositories on the disk: commits, listings and hashes.

A repository is the directory `<root>/<org>/<name>`; it has one revision, `main`, whose commit is a digest of its
content. Everything here blocks: call it in a worker thread.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_demo.url_parsing import DEFAULT_REVISION, is_model

HASH_CHUNK_BYTES = 1 << 20
# Never listed: files of version control and of download clients.
_HIDDEN = frozenset({".git", ".cache", "__pycache__"})


@dataclass(frozen=True)
class TreeEntry:
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
        """The ETag of the content: sha256 for large files, the git blob sha1 for small ones."""
        return self.sha256 if self.is_lfs else self.git_oid

    def as_tree_item(self) -> dict[str, Any]:
        """Return the file in the form of the tree API."""
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
        """Return the file in the form of the model API, with sizes and hashes if `with_blobs`."""
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
    entries: dict[str, TreeEntry]

    def has_revision(self, revision: str) -> bool:
        """Return whether `revision` is `main` or the commit."""
        return revision in (DEFAULT_REVISION, self.commit)

    def list_tree(self, folder: str, recursive: bool) -> list[dict[str, Any]] | None:
        """Return the items under `folder` in path order; None for an unknown folder."""
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
    """Return (git blob sha1, sha256) of a file, in one pass."""
    git_sha1 = hashlib.sha1(f"blob {size_bytes}\0".encode())
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            git_sha1.update(chunk)
            sha256.update(chunk)
    return git_sha1.hexdigest(), sha256.hexdigest()


class RepoStore:
    """The repositories in one directory. A file is hashed once per (path, mtime, size). Not thread-safe."""

    def __init__(self, root: Path, lfs_from_bytes: int) -> None:
        self._root = root
        self._lfs_from_bytes = lfs_from_bytes
        self._hashes: dict[Path, tuple[tuple[int, int], tuple[str, str]]] = {}

    def models(self) -> list[str]:
        """Return the ids of all models, sorted."""
        names = (path.relative_to(self._root).as_posix() for path in self._root.glob("*/*") if path.is_dir())
        return sorted(model for model in names if is_model(model))

    def repository(self, model: str) -> Repository | None:
        """Return a model as it is on the disk now; None if it does not exist."""
        directory = self._root / model
        if not is_model(model) or not directory.is_dir():
            return None
        entries: dict[str, TreeEntry] = {}
        for path in sorted(directory.rglob("*")):
            relative = path.relative_to(directory)
            if _HIDDEN.isdisjoint(relative.parts) and path.is_file():
                entries[relative.as_posix()] = self._entry(relative.as_posix(), path)
        digest = hashlib.sha1()
        for entry in entries.values():
            digest.update(f"{entry.path}\0{entry.size_bytes}\0{entry.sha256}\n".encode())
        return Repository(model, digest.hexdigest(), entries)

    def find_sha256(self, sha256: str, model: str | None, path: str | None) -> tuple[Repository, TreeEntry] | None:
        """Return a large file by its hash; `model` and `path` select one of several with the same bytes."""
        for candidate in [model] if model else self.models():
            repository = self.repository(candidate)
            for entry in repository.entries.values() if repository else ():
                if entry.is_lfs and entry.sha256 == sha256 and path in (None, entry.path):
                    assert repository is not None
                    return repository, entry
        return None

    def _entry(self, relative: str, path: Path) -> TreeEntry:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        cached = self._hashes.get(path)
        if cached is None or cached[0] != stamp:
            cached = (stamp, _hash_file(path, status.st_size))
            self._hashes[path] = cached
        git_oid, sha256 = cached[1]
        size_bytes = status.st_size
        is_lfs = size_bytes >= self._lfs_from_bytes or relative.endswith(".safetensors")
        pointer = f"oid sha256:{sha256}\nsize {size_bytes}\n".encode() if is_lfs else b""
        if is_lfs:
            # Git stores a short pointer in place of a large file. Clients show its oid and never verify it.
            git_oid = hashlib.sha1(f"blob {len(pointer)}\0".encode() + pointer).hexdigest()
        return TreeEntry(relative, size_bytes, git_oid, sha256, is_lfs, len(pointer), path)
