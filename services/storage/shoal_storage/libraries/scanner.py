"""List the files of a library, and hash them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from shoal_common.errors import BadInput
from shoal_common.store.blob_lookup import is_as_it_was, open_plain
from shoal_common.store.mounts import kind_of, mounts
from shoal_storage.files.hashing import Digests, digest_of
from shoal_storage.files.real_path import real_root
from shoal_storage.ledger.library_model import File, Seen
from shoal_storage.libraries.recognize import Entry, Listing, cached_blob, is_store, is_to_be_read, leads_to_models

MOST_ENTRIES = 200_000
_MAX_TEXT_BYTES = 16 << 20
_WITH_GIT_BYTES = 16 << 20
"""Both hashes are computed up to this size: a hub names files up to 10 MB by their git sha1."""
_UNSTABLE_INODES = frozenset({"9p", "afpfs", "cifs", "smb3", "smbfs"})
"""File systems whose inode numbers may change between mounts; FUSE too."""


class Unlistable(Exception):
    """A library cannot be listed; the message says why."""


def refuse_overlap(libraries: Iterable[str], store: Path) -> None:
    """Raise BadInput for a library inside, or around, the store: Shoal writes to the store."""
    real_store = Path(os.path.realpath(store))
    for library in libraries:
        real = real_root(library)
        if real.is_relative_to(real_store) or real_store.is_relative_to(real):
            raise BadInput(
                f"the library {library} and the store at {store} overlap: give a directory outside of it, or move "
                "the store (storage.path in node.toml)",
                param="read_only_roots",
            )


def list_root(root: str, keep_on: Callable[[], None]) -> Listing:
    """List a library where models may be. `check_stopping` is called often, may raise. Raises LibraryUnreadable."""
    real = real_root(root)
    try:
        str(real).encode()
        with os.scandir(real) as top:
            names = [e.name for e in top]
    except UnicodeEncodeError:
        raise Unlistable("its path is not UTF-8") from None
    except OSError as e:
        raise Unlistable(e.strerror or str(e)) from None
    kind = kind_of(real, mounts())
    stable_inodes = kind not in _UNSTABLE_INODES and "fuse" not in kind
    lister = _Lister(Listing(str(real)), is_store(names), stable_inodes, keep_on)
    try:
        lister.walk(())
    except OSError as e:
        raise Unlistable(e.strerror or str(e)) from None
    lister.read_texts()
    return lister.listing


class _Lister:
    def __init__(
        self, listing: Listing, is_store: bool, stable_inodes: bool, check_stopping: Callable[[], None]
    ) -> None:
        self.listing, self._is_store, self._stable_inodes = listing, is_store, stable_inodes
        self._check_stopping = check_stopping

    def walk(self, parents: tuple[str, ...]) -> None:
        self._check_stopping()
        with os.scandir(Path(self.listing.root, *parents)) as directory:
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
                entry = Entry("other")
            except FileNotFoundError:
                continue  # deleted meanwhile
            self.listing.entries[path] = entry
            if len(self.listing.entries) > MOST_ENTRIES:
                raise Unlistable(f"it has more than {MOST_ENTRIES} files: give a directory that holds models only")
            if entry.kind == "directory" and leads_to_models(parts, self._is_store):
                try:
                    self.walk(parts)
                except FileNotFoundError:
                    continue
                except OSError as e:
                    self.listing.unreadable[path] = e.strerror or str(e)

    def _entry(self, entry: os.DirEntry[str]) -> Entry:
        if entry.is_symlink():
            target = str(Path(entry.path).readlink())
            target.encode()
            return Entry("link", target=target)
        if entry.is_dir(follow_symlinks=False):
            return Entry("directory")
        status = entry.stat(follow_symlinks=False)
        file_stat = Seen(status.st_size, status.st_mtime_ns, status.st_ino if self._stable_inodes else 0)
        return Entry("file" if stat.S_ISREG(status.st_mode) else "other", file_stat)

    def read_texts(self) -> None:
        """Read the files that describe others (`describes_files`); skip unreadable and oversized ones."""
        listing = self.listing
        for path, entry in listing.entries.items():
            if entry.kind in ("file", "link") and is_to_be_read(path, self._is_store):
                self._check_stopping()
                source = cached_blob(path, entry.target, listing.root) if entry.kind == "link" else path
                target = listing.entries.get(source or "")
                if source and target and target.kind == "file" and target.seen.size_bytes <= _MAX_TEXT_BYTES:
                    try:
                        with open_plain(f"{listing.root}/{source}") as f:
                            listing.texts[path] = f.read(_MAX_TEXT_BYTES)
                    except OSError:
                        continue


def hash_file(file: File, between: Callable[[], None]) -> Digests | None:
    """Hash a file; return None if it is gone or has changed since it was listed. Raises OSError if unreadable.

    `on_progress` is called before each step and may raise to abort.
    """
    try:
        with open_plain(file.at) as f:
            if not is_as_it_was(os.fstat(f.fileno()), file.seen):
                return None
            git = file.expected.startswith("git-") or file.seen.size_bytes <= _WITH_GIT_BYTES
            digests = digest_of(f, git, between)
            # A file that was written to meanwhile hashes to neither its old nor its new bytes.
            return digests if is_as_it_was(os.fstat(f.fileno()), file.seen) else None
    except FileNotFoundError:
        return None
