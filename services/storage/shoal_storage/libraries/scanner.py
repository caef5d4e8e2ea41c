"""List the files of a library, and hash them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from shoal_common.errors import BadInput, Corrupt
from shoal_common.models.safetensors_header import PREFIX_BYTES, header_end, parse_tensors
from shoal_common.store.blob_lookup import is_unchanged, open_regular_file
from shoal_common.store.mounts import file_system_of, mounts
from shoal_storage.files.hashing import FileHashes, hash_open_file
from shoal_storage.files.real_path import resolve_path
from shoal_storage.ledger.library_model import FileStat, LibraryFile
from shoal_storage.libraries.recognize import (
    WEIGHTS_SUFFIX,
    DirEntry,
    LibraryListing,
    describes_files,
    is_store,
    may_contain_models,
    resolve_cache_link,
)

MAX_ENTRIES = 200_000
_MAX_TEXT_BYTES = 16 << 20
_WITH_GIT_BYTES = 16 << 20
"""Both hashes are computed up to this size: a hub names files up to 10 MB by their git sha1."""
_UNSTABLE_INODES = frozenset({"9p", "afpfs", "cifs", "smb3", "smbfs"})
"""File systems whose inode numbers may change between mounts; FUSE too."""


class LibraryUnreadable(Exception):
    """A library cannot be listed; the message says why."""


def reject_overlap(libraries: Iterable[str], store: Path) -> None:
    """Raise BadInput for a library inside, or around, the store: Shoal writes to the store."""
    real_store = Path(os.path.realpath(store))
    for library in libraries:
        real = resolve_path(library)
        if real.is_relative_to(real_store) or real_store.is_relative_to(real):
            raise BadInput(
                f"the library {library} and the store at {store} overlap: give a directory outside of it, or move "
                "the store (storage.path in node.toml)",
                param="libraries",
            )


def list_library(library: str, check_stopping: Callable[[], None]) -> LibraryListing:
    """List a library where models may be. `check_stopping` is called often, may raise. Raises LibraryUnreadable."""
    real = resolve_path(library)
    try:
        str(real).encode()
        with os.scandir(real) as top:
            names = [e.name for e in top]
    except UnicodeEncodeError:
        raise LibraryUnreadable("its path is not UTF-8") from None
    except OSError as e:
        raise LibraryUnreadable(e.strerror or str(e)) from None
    kind = file_system_of(real, mounts())
    stable_inodes = kind not in _UNSTABLE_INODES and "fuse" not in kind
    lister = _Lister(LibraryListing(str(real)), is_store(names), stable_inodes, check_stopping)
    try:
        lister.walk(())
    except OSError as e:
        raise LibraryUnreadable(e.strerror or str(e)) from None
    lister.read_files()
    return lister.listing


class _Lister:
    def __init__(
        self, listing: LibraryListing, is_store: bool, stable_inodes: bool, check_stopping: Callable[[], None]
    ) -> None:
        self.listing, self._is_store, self._stable_inodes = listing, is_store, stable_inodes
        self._check_stopping = check_stopping

    def walk(self, parents: tuple[str, ...]) -> None:
        self._check_stopping()
        with os.scandir(Path(self.listing.path, *parents)) as directory:
            children = sorted(directory, key=lambda e: e.name)
        for child in children:
            parts = (*parents, child.name)
            path = "/".join(parts)
            try:
                path.encode()
                entry = self._entry(child)
            except UnicodeEncodeError:
                # No file of a model can have this name; listing it keeps its model from counting as complete.
                path = path.encode(errors="replace").decode()
                entry = DirEntry("other")
            except FileNotFoundError:
                continue  # deleted meanwhile
            self.listing.entries[path] = entry
            if len(self.listing.entries) > MAX_ENTRIES:
                raise LibraryUnreadable(
                    f"it has more than {MAX_ENTRIES} files: give a directory that holds models only"
                )
            if entry.kind == "directory" and may_contain_models(parts, self._is_store):
                try:
                    self.walk(parts)
                except FileNotFoundError:
                    continue
                except OSError as e:
                    self.listing.unreadable[path] = e.strerror or str(e)

    def _entry(self, entry: os.DirEntry[str]) -> DirEntry:
        if entry.is_symlink():
            target = str(Path(entry.path).readlink())
            target.encode()
            return DirEntry("link", target=target)
        if entry.is_dir(follow_symlinks=False):
            return DirEntry("directory")
        status = entry.stat(follow_symlinks=False)
        file_stat = FileStat(status.st_size, status.st_mtime_ns, status.st_ino if self._stable_inodes else 0)
        return DirEntry("file" if stat.S_ISREG(status.st_mode) else "other", file_stat)

    def read_files(self) -> None:
        """Read files that describe others (`describes_files`) and headers of weights; skip unreadable ones."""
        for path, entry in self.listing.entries.items():
            is_text = describes_files(path, self._is_store)
            if entry.kind in ("file", "link") and (is_text or path.endswith(WEIGHTS_SUFFIX)):
                self._check_stopping()
                with suppress(OSError):
                    self._read_file(path, entry, is_text)

    def _read_file(self, path: str, entry: DirEntry, is_text: bool) -> None:
        listing = self.listing
        source = resolve_cache_link(path, entry.target, listing.path) if entry.kind == "link" else path
        target = listing.entries.get(source or "")
        if source is None or target is None or target.kind != "file":
            return
        absolute = f"{listing.path}/{source}"
        if not is_text:
            if reason := _checked_weights(absolute, target.stat):
                listing.unusable_weights[path] = f"{path.rpartition('/')[2]} cannot be used: {reason}"
        elif target.stat.size_bytes <= _MAX_TEXT_BYTES:
            with open_regular_file(absolute) as f:
                listing.texts[path] = f.read(_MAX_TEXT_BYTES)


def check_weights(path: str, file_stat: FileStat) -> str:
    """Return why a file is not the safetensors file that its header describes; "" if it is. Raises OSError."""
    name = path.rpartition("/")[2]
    try:
        with open_regular_file(path) as f:
            end = header_end(f.read(PREFIX_BYTES), name)
            if end <= file_stat.size_bytes:
                f.seek(0)
                tensors = parse_tensors(f.read(end), name)
                end = max((t.end for t in tensors.values()), default=end)
    except Corrupt as e:
        return e.message
    if end > file_stat.size_bytes:
        return f"it is incomplete: its header describes {end} bytes, and the file has {file_stat.size_bytes}"
    return ""


_checked_weights = lru_cache(maxsize=MAX_ENTRIES)(check_weights)


def hash_file(file: LibraryFile, on_progress: Callable[[], None]) -> FileHashes | None:
    """Hash a file; return None if it is gone or has changed since it was listed. Raises OSError if unreadable.

    `on_progress` is called before each step and may raise to abort.
    """
    try:
        with open_regular_file(file.absolute_path) as f:
            if not is_unchanged(os.fstat(f.fileno()), file.stat):
                return None
            git = file.expected_hash.startswith("git-") or file.stat.size_bytes <= _WITH_GIT_BYTES
            digests = hash_open_file(f, git, on_progress)
            # A file that was written to meanwhile hashes to neither its old nor its new bytes.
            return digests if is_unchanged(os.fstat(f.fileno()), file.stat) else None
    except FileNotFoundError:
        return None
