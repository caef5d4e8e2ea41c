"""Libraries for tests: caches as huggingface_hub makes them, and a snapshot of a whole library for comparison."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.storage.store_fixtures import git_sha1, sha256


def config() -> bytes:
    """A file that every model has and that is named by its git sha1."""
    return b'{"model_type": "none"}'


def cached(root: Path, repo: str, commit: str, files: Mapping[str, bytes], refs: tuple[str, ...] = ("main",)) -> Path:
    """A model as huggingface_hub leaves it in its cache: large files by sha256, the others by git sha1."""
    top = root / f"models--{repo.replace('/', '--')}"
    snapshot = top / "snapshots" / commit
    (top / "blobs").mkdir(parents=True, exist_ok=True)
    for path, data in files.items():
        etag = git_sha1(data) if path.endswith((".json", ".md")) else sha256(data)
        (top / "blobs" / etag).write_bytes(data)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(top / "blobs" / etag, link.parent))
    for name in refs:
        ref = top / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
    return snapshot


def plain(root: Path, repo: str, files: Mapping[str, bytes]) -> Path:
    """A model as a plain directory."""
    for path, data in files.items():
        file = root / repo / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root / repo


def snapshot_tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a library, itself included, that must not change: names, types, contents, modes, times, links."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *sorted(root.rglob("*"))):
        at = path.lstat()
        content: object = None
        if path.is_symlink():
            content = str(path.readlink())
        elif stat.S_ISREG(at.st_mode):
            content = sha256(path.read_bytes())
        found[str(path)] = (at.st_mode, at.st_nlink, at.st_ino, at.st_mtime_ns, at.st_ctime_ns, at.st_size, content)
    return found


@contextmanager
def mounted_read_only(root: Path) -> Iterator[Path]:
    """The same directory as a read-only mount, as a NAS may be mounted. Skips where that is not possible."""
    at = root.with_name(f"{root.name}-ro")
    at.mkdir()
    if sys.platform != "linux" or _mount("--bind", str(root), str(at)):
        pytest.skip("a read-only bind mount cannot be had here: what a root is kept from is not tested")
    try:
        assert not _mount("-o", "remount,bind,ro", str(at))
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def _mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode
