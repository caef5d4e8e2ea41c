"""A partial that is verified by its leaf list instead of by sha256 (docs/transfer.md). Blocking: runs in threads.

    partial/<blob>/leaves      the list, written by the fetcher; believed when it hashes to a root that is sealed

A list with such a root is as good as the blob's name: somebody in the cluster has hashed exactly these leaves to it.
A list that does not hash to the root says nothing, and then the whole is hashed by sha256, as without a root.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from shoal_common.errors import Corrupt
from shoal_common.layout import Bitmap, Layout
from shoal_common.leaves import list_bytes, root_of
from shoal_common.logs import Log
from shoal_storage.digests import Digests, unlike
from shoal_storage.durable import write_file

log = Log("listed")


class BadLeaves(Corrupt):
    """Some leaves are not what a sealed list says: these alone have to come anew."""

    def __init__(self, blob: str, leaves: list[int]) -> None:
        super().__init__(
            f"{len(leaves)} leaves of {blob[:16]}… are not on the disk as they arrived; they are fetched again",
            bad_leaves=len(leaves),
        )
        self.leaves = leaves


def sealed_list(layout: Layout, blob: str, size_bytes: int, root: str) -> bytes | None:
    """The partial's own list, if it hashes to this root; None when there is none, or it is not to be believed."""
    if not root or blob.startswith("git-"):  # the list says nothing of git's sha1, nor of a sha256 not yet known
        return None
    try:
        hashes = layout.partial_leaves(blob).read_bytes()
    except FileNotFoundError:
        hashes = b""
    if len(hashes) == list_bytes(size_bytes) and root_of(hashes) == root:
        return hashes
    log.warning("a partial's list is not the one that is sealed; hashing by sha256", blob=blob)
    return None


def compare(data: Path, blob: str, size_bytes: int, hashes: bytes, between: Callable[[], None]) -> Digests:
    """Hash a partial's data leaf by leaf against a sealed list. Raises BadLeaves, or Corrupt for another size."""
    with FileIO(data) as f:
        found = os.fstat(f.fileno())
        if found.st_size > size_bytes:
            raise Corrupt(
                f"{found.st_size} bytes were received for {blob[:16]}… instead of {size_bytes}; they are discarded "
                "and fetched again",
                expected=blob,
            )
        bad = unlike(f, hashes, between)
    if bad:
        raise BadLeaves(blob, bad)
    return Digests(sha256=blob, git_sha1="", size_bytes=size_bytes, leaves=hashes, mtime_ns=found.st_mtime_ns)


def forget(layout: Layout, blob: str, size_bytes: int, leaves: list[int]) -> None:
    """Say of leaves of a partial that they are not there, durably. The rest of it stays."""
    layout.partial_ready(blob).unlink(missing_ok=True)  # the fetcher begins it anew
    have = layout.partial(blob) / "have"
    said = Bitmap(size_bytes, have.read_bytes() if have.exists() else b"")
    kept = Bitmap(size_bytes)
    for leaf in set(range(said.leaves)) - set(leaves):
        if leaf in said:
            kept.add(leaf)
    write_file(have, kept.to_bytes())
