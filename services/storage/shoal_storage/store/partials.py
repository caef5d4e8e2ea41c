"""Partial blobs on the disk: reserve, verify, remove."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from shoal_common.errors import Corrupt, Unavailable
from shoal_common.host.private_files import DIRECTORY_MODE, FILE_MODE
from shoal_common.messages import WireStruct, encode
from shoal_common.names import ModelId
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import Bitmap
from shoal_common.store.leaf_set import from_bitmap
from shoal_storage.files.atomic_file import fsync_path, replace_file
from shoal_storage.files.hashing import FileHashes, hash_file
from shoal_storage.files.leaf_list_verify import read_sealed_list, verify_leaves
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.store.store import Store


class PartialMeta(WireStruct):
    """`partial/<blob>/meta.json`: the reservation of a partial blob."""

    size_bytes: int
    models: list[ModelId]
    leaves: dict[ModelId, list[list[int]]] = {}
    """The leaves wanted by each model that does not want the whole blob, `[first, last)` each."""


def allocated_bytes(store: Store, blob: str, size_bytes: int) -> int:
    """Return the bytes that a partial blob occupies; preallocation past its size does not count."""
    try:
        return min((store.layout.partial(blob) / "data").stat().st_blocks * 512, size_bytes)
    except OSError:
        return 0


def refresh_partial(store: Store, blob: str, ledger: Ledger) -> None:
    """Record in the ledger how much of a partial blob is allocated, and which leaves are durable."""
    partial = ledger.arrivals.partials[blob]
    durable = durable_leaves(store, blob, partial.size_bytes) if partial.leaves_by_model else partial.durable_leaves
    ledger.arrivals.record_allocated(blob, allocated_bytes(store, blob, partial.size_bytes), durable)


def durable_leaves(store: Store, blob: str, size_bytes: int) -> int:
    """Return the leaves in a partial blob's bitmap."""
    try:
        return from_bitmap(Bitmap(size_bytes, (store.layout.partial(blob) / "have").read_bytes()).to_bytes())
    except FileNotFoundError:
        return 0


def has_partial(store: Store, blob: str) -> bool:
    """Whether a partial blob's data file still exists."""
    return (store.layout.partial_link(blob) / "data").is_file()


def write_partial(
    store: Store, blob: str, size_bytes: int, models: Iterable[ModelId], wanted: Mapping[ModelId, int] | None = None
) -> None:
    """Make a partial blob's directory, or change which models reserve it, and which leaves each wants."""
    store.require_volume(blob)
    directory = store.layout.partial(blob)
    directory.mkdir(DIRECTORY_MODE, exist_ok=True)
    if not (directory / "data").exists():
        for claims in ("have", "ready", "leaves"):  # they describe data that is gone
            (directory / claims).unlink(missing_ok=True)
        (directory / "data").touch(mode=FILE_MODE)
    # Last: a directory with a meta.json is a reservation and has its data.
    ranges = {model: leaf_set.to_ranges(leaves) for model, leaves in (wanted or {}).items()}
    meta = PartialMeta(size_bytes=size_bytes, models=sorted(models), leaves=ranges)
    replace_file(directory / "meta.json", encode(meta))
    fsync_path(directory.parent)
    link_partial(store, blob)


def link_partial(store: Store, blob: str) -> None:
    """Link a volume's partial blob into the store, where the other services look. A start does it again."""
    link, directory = store.layout.partial_link(blob), store.layout.partial(blob)
    if link == directory or (link.is_symlink() and link.readlink() == directory):
        return
    store.delete(link)
    link.symlink_to(directory)


def delete_partial(store: Store, blob: str) -> None:
    """Delete a partial blob and its reservation, durably: one that came back would stay reserved for ever."""
    directory = store.layout.partial(blob)
    store.delete(directory)
    fsync_path(directory.parent)
    unlink_partial(store, blob)


def unlink_partial(store: Store, blob: str) -> None:
    link = store.layout.partial_link(blob)
    if link.is_symlink():
        link.unlink(missing_ok=True)


def verify_partial(store: Store, blob: str, size_bytes: int, leaf_list_digest: str = "") -> FileHashes:
    """Make a partial blob durable and hash all of it: by leaf if its list has the given digest, else by sha256.

    Raises Corrupt on a mismatch; CorruptLeaves when only some leaves mismatch.
    """
    data, failed = store.layout.partial(blob) / "data", threading.Event()
    hashes = read_sealed_list(store.layout, blob, size_bytes, leaf_list_digest)

    def on_progress() -> None:
        store.check_stopping()
        if failed.is_set():
            raise Unavailable("fsync failed; hashing stopped")

    # In parallel: fsync waits for the disk, hashing for the processor.
    with data.open("rb") as f, ThreadPoolExecutor(1) as executor:
        if hashes is None:
            hashing = executor.submit(hash_file, data, blob.startswith("git-"), on_progress)
        else:
            hashing = executor.submit(verify_leaves, data, blob, size_bytes, hashes, on_progress)
        try:
            os.fsync(f.fileno())
        except OSError as e:
            failed.set()
            # Final: the next fsync would report success although the bytes are lost.
            raise Corrupt(
                f"the disk could not store the bytes of {blob[:16]}… ({e.strerror}); "
                "they are discarded and fetched again"
            ) from None
        digests = hashing.result()
    name = f"git-{digests.git_sha1}" if digests.git_sha1 else digests.sha256
    if name != blob or digests.size_bytes != size_bytes:
        raise Corrupt(
            f"the bytes received for {blob[:16]}… hash to {name[:16]}… ({digests.size_bytes} of {size_bytes} "
            "bytes); they are discarded and fetched again",
            expected=blob,
            found=name,
        )
    return digests
