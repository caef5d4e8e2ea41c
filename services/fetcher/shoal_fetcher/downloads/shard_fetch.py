"""Fetches the part of a model that stages with some layers need (docs/sparse.md)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shoal_common.errors import DISK_FULL, Corrupt, DiskFull, ShoalError
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import ReserveResult
from shoal_common.models.safetensors_header import PREFIX_BYTES, header_end
from shoal_common.store import leaf_set
from shoal_common.store.blob_lookup import find_blob
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_list_size
from shoal_common.store.leaf_set import from_bitmap
from shoal_common.store.store_paths import StorePaths
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.errors import BlobHashMismatch, ReservationLost
from shoal_fetcher.partials.bitmap_file import read_bitmap
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.leaf_selection import CONFIG, first_leaves, header_leaves, stage_leaves, weight_files
from shoal_fetcher.storage_client import StorageClient

log = StructuredLogger("parts")

_MAX_ATTEMPTS = 3
"""The fetch fails after this many times that leaves did not match the sealed list."""

FetchLeaves = Callable[[list[tuple[ManifestFile, int | None]]], Awaitable[None]]
"""Makes these files, or the given leaves of them, present."""
LeafLists = Mapping[str, bytes]
"""Leaf hashes by blob, from a list whose digest is sealed."""


class LeafListReader(Protocol):
    """Reads leaf lists from nodes."""

    async def leaf_list(self, node: str, blob: str, start: int, size_bytes: int) -> bytes:
        """Return bytes of a blob's leaf list as a node sends it. Raises ShoalError."""


async def sealed_lists(manifest: Manifest, cluster_view: ClusterView, lists: LeafListReader) -> LeafLists | None:
    """Return the leaf lists of all weight files; None if one is not available, so that leaves cannot be verified.

    A list is trusted by its digest, which is in the manifest of a node that has the model.
    """
    by_blob: dict[str, bytes] = {}
    for file in weight_files(manifest):
        hashes = (
            await _sealed_list(manifest, file, cluster_view, lists) if file.sha256 and file.leaf_list_digest else None
        )
        if hashes is None:
            log.info("no sealed leaf list available, fetching the whole model", model=manifest.model, path=file.path)
            return None
        by_blob[file.blob] = hashes
    return by_blob or None


async def _sealed_list(
    manifest: Manifest, file: ManifestFile, cluster_view: ClusterView, lists: LeafListReader
) -> bytes | None:
    for holder in cluster_view.holders(file.blob, manifest):
        try:
            hashes = await lists.leaf_list(holder.node, file.sha256, 0, leaf_list_size(file.size_bytes))
        except ShoalError as e:
            log.info("a node did not return its leaf list", peer=holder.node, path=file.path, reason=e.message)
            continue
        if hash_leaf_list(hashes) == file.leaf_list_digest:
            return hashes
        log.warning("a node returned a leaf list with the wrong digest", peer=holder.node, path=file.path)
    return None


class ShardFetch:
    """Fetches one shard: some layers of one model."""

    def __init__(
        self,
        manifest: Manifest,
        layers: list[list[int]],
        lists: LeafLists,
        layout: StorePaths,
        storage: StorageClient,
        progress: Progress,
        fetch: FetchLeaves,
    ) -> None:
        self._manifest, self._layers, self._lists = manifest, layers, lists
        self._layout, self._storage, self._progress, self._fetch = layout, storage, progress, fetch

    async def run(self) -> bool:
        """Make the shard present. Returns False if the whole model is. Raises what storage and sources raise."""
        manifest, files = self._manifest, weight_files(self._manifest)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            leaves = first_leaves(manifest)
            if await self._fetch_leaves(leaves):
                return False
            for file in files:
                end = await asyncio.to_thread(self._header_end, file)
                leaves[file.blob] |= header_leaves(end, file)
            await self._fetch_leaves(leaves)
            leaves |= await asyncio.to_thread(self._stage_leaves, files)
            await self._fetch_leaves(leaves)
            await self._progress.publish_state(phase="verifying", waiting_for="storage")
            leaf_list_digests = {file.blob: file.leaf_list_digest for file in files}
            try:
                await self._storage.seal_shard(manifest, self._layers, leaves, leaf_list_digests)
            except BlobHashMismatch as e:
                if attempt == _MAX_ATTEMPTS:
                    raise
                log.warning("corrupt leaves, fetching their blob again", reason=e.message)
                continue
            return True
        raise AssertionError("the last attempt returns or raises")

    async def _fetch_leaves(self, leaves: Mapping[str, int]) -> bool:
        """Reserve and fetch these leaves, of unnamed blobs all. Returns whether the whole model is present."""
        await self._progress.publish_state(phase="reserving", waiting_for="storage")
        reserved = await self._storage.reserve(self._manifest, leaves)
        present = set(reserved.present)
        if present >= self._manifest.blob_sizes.keys():
            return True
        missing = await self._missing(reserved, leaves)
        await self._progress.publish_state(phase="fetching", waiting_for="")
        await self._fetch(missing)
        return False

    async def _missing(
        self, reserved: ReserveResult, leaves: Mapping[str, int]
    ) -> list[tuple[ManifestFile, int | None]]:
        """Return what to fetch. Counts what is present, and writes the leaf lists beside the partial blobs."""
        progress, present, total_bytes = self._progress, set(reserved.present), 0
        progress.reset_counts()
        missing: list[tuple[ManifestFile, int | None]] = []
        for blob, file in {f.blob: f for f in self._manifest.files}.items():
            wanted = leaves.get(blob)
            needed = leaf_set.all_leaves(file.size_bytes) if wanted is None else wanted
            total_bytes += leaf_set.byte_count(needed, file.size_bytes)
            if blob in present:
                progress.set_blob_complete(blob, blob, file.size_bytes)
                continue
            if not needed and file.size_bytes:
                continue
            directory = self._layout.partial(blob)
            if blob in self._lists:
                await asyncio.to_thread(_write_small, self._layout.partial_leaves(blob), self._lists[blob])
            bitmap = await asyncio.to_thread(read_bitmap, directory, file.size_bytes)
            durable = from_bitmap(bitmap.to_bytes())
            progress.set_durable_bytes(blob, leaf_set.byte_count(durable, file.size_bytes))
            if wanted is None or needed & ~durable:
                missing.append((file, wanted))
        progress.set_total_bytes(total_bytes)
        return missing

    def _header_end(self, file: ManifestFile) -> int:
        with self._open(file) as f:
            return header_end(f.read(PREFIX_BYTES), file.path)

    def _stage_leaves(self, files: list[ManifestFile]) -> dict[str, int]:
        headers: dict[str, bytes] = {}
        for file in files:
            with self._open(file) as f:
                end = header_end(f.read(PREFIX_BYTES), file.path)
                f.seek(0)
                headers[file.blob] = f.read(end)
        return stage_leaves(self._config(), headers, files, self._layers)

    def _config(self) -> dict[str, Any]:
        file = next((f for f in self._manifest.files if f.path == CONFIG), None)
        try:
            assert file is not None
            with self._open(file) as f:
                config = json.load(f)
            assert isinstance(config, dict)
        except (AssertionError, ValueError, RecursionError):
            raise Corrupt(f"{self._manifest.model} has no readable {CONFIG}") from None
        return config

    def _open(self, file: ManifestFile) -> BinaryIO:
        """Open a file that is complete or partial."""
        try:
            return find_blob(self._layout, file.blob).open("rb")
        except FileNotFoundError:
            pass
        try:
            return (self._layout.partial(file.blob) / "data").open("rb")
        except FileNotFoundError:
            raise ReservationLost(f"the reservation of blob {file.blob[:16]}… is gone") from None


def _write_small(path: Path, data: bytes) -> None:
    """Replace a small file, not durably: its digest verifies it. Raises ReservationLost, DiskFull."""
    try:
        if path.exists() and path.read_bytes() == data:
            return
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(data)
        new.replace(path)
    except FileNotFoundError:
        raise ReservationLost(f"the reservation of blob {path.parent.name[:16]}… is gone") from None
    except OSError as e:
        if e.errno not in DISK_FULL:
            raise
        blob = path.parent.name
        raise DiskFull(
            f"disk full: {e.strerror} while writing blob {blob[:16]}…; free some space and the download resumes",
            blob=blob,
        ) from None
