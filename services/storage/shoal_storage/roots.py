"""Read-only roots, read: listed, their small files read, their files hashed. Nothing here writes. For threads.

Links are never followed but by name, into a Hugging Face cache's own blobs (`adopt.py`): a root that is given by a
link is what the link leads to, and what is a link below it is listed as one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from shoal_common.blobs import is_as_it_was, open_plain
from shoal_common.errors import BadInput
from shoal_common.filesystem import kind_of, mounts
from shoal_storage.adopt import Entry, Listing, cached_blob, is_store, is_to_be_read, leads_to_models
from shoal_storage.adopted import File, Seen
from shoal_storage.digests import Digests, digest_of

MOST_ENTRIES = 200_000
_MOST_TEXT_BYTES = 16 << 20
_WITH_GIT_BYTES = 16 << 20
"""Up to here both hashes are taken: a hub names files by git's sha1 up to 10 MB."""
_MADE_UP_INODES = frozenset({"9p", "afpfs", "cifs", "smb3", "smbfs"})
"""File systems whose inode numbers may be others the next time; FUSE too."""


class Unlistable(Exception):
    """A root cannot be looked at; the message says why."""


def real_root(root: str) -> Path:
    """Where a root really is. It may not exist."""
    path = Path(root)
    with suppress(RuntimeError):  # `~name` of nobody: no such directory
        path = path.expanduser()
    return Path(os.path.realpath(path))


def refuse_overlap(roots: Iterable[str], store: Path) -> None:
    """Raise BadInput for a root in the store, or around it: what Shoal itself writes is no read-only root."""
    ours = Path(os.path.realpath(store))
    for root in roots:
        real = real_root(root)
        if real.is_relative_to(ours) or ours.is_relative_to(real):
            raise BadInput(
                f"the read-only root {root} and the store at {store} are one in the other: give another directory, "
                "or move the store (storage.path in node.toml)",
                param="read_only_roots",
            )


def list_root(root: str, keep_on: Callable[[], None]) -> Listing:
    """What is in a root, where models may be. Raises Unlistable. `keep_on` is called now and then, and may raise."""
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
    lister = _Lister(Listing(str(real)), is_store(names), kind not in _MADE_UP_INODES and "fuse" not in kind, keep_on)
    try:
        lister.walk(())
    except OSError as e:
        raise Unlistable(e.strerror or str(e)) from None
    lister.read_texts()
    return lister.listing


class _Lister:
    def __init__(self, listing: Listing, store: bool, with_inodes: bool, keep_on: Callable[[], None]) -> None:
        self.listing, self._store, self._with_inodes, self._keep_on = listing, store, with_inodes, keep_on

    def walk(self, above: tuple[str, ...]) -> None:
        self._keep_on()
        with os.scandir(Path(self.listing.root, *above)) as directory:
            found = sorted(directory, key=lambda e: e.name)
        for entry in found:
            parts = (*above, entry.name)
            path = "/".join(parts)
            try:
                path.encode()
                described = self._entry(entry)
            except UnicodeEncodeError:
                # No model's file can be called so: its model must not be taken for one without it.
                path = path.encode(errors="replace").decode()
                described = Entry("other")
            except FileNotFoundError:
                continue  # gone while we looked
            self.listing.entries[path] = described
            if len(self.listing.entries) > MOST_ENTRIES:
                raise Unlistable(f"it has more than {MOST_ENTRIES} files: give a directory that holds models only")
            if described.kind == "directory" and leads_to_models(parts, self._store):
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
        found = entry.stat(follow_symlinks=False)
        seen = Seen(found.st_size, found.st_mtime_ns, found.st_ino if self._with_inodes else 0)
        return Entry("file" if stat.S_ISREG(found.st_mode) else "other", seen)

    def read_texts(self) -> None:
        """Read what `adopt.is_to_be_read` names; what cannot be read, or is too large, is left out."""
        listing = self.listing
        for path, entry in listing.entries.items():
            if entry.kind in ("file", "link") and is_to_be_read(path, self._store):
                self._keep_on()
                source = cached_blob(path, entry.target, listing.root) if entry.kind == "link" else path
                held = listing.entries.get(source or "")
                if source and held and held.kind == "file" and held.seen.size_bytes <= _MOST_TEXT_BYTES:
                    try:
                        with open_plain(f"{listing.root}/{source}") as f:
                            listing.texts[path] = f.read(_MOST_TEXT_BYTES)
                    except OSError:
                        continue


def hash_file(file: File, between: Callable[[], None]) -> Digests | None:
    """Hash a file; None when it is not, or no longer, the one that was listed. Raises OSError when it cannot be read.

    `between` is called before each step, and may raise to end this.
    """
    try:
        with open_plain(file.at) as f:
            if not is_as_it_was(os.fstat(f.fileno()), file.seen):
                return None
            git = file.expected.startswith("git-") or file.seen.size_bytes <= _WITH_GIT_BYTES
            found = digest_of(f, git, between)
            # Written to while it was read, it is none of what it was before and after.
            return found if is_as_it_was(os.fstat(f.fileno()), file.seen) else None
    except FileNotFoundError:
        return None
