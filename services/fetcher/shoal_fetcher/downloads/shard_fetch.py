"""Fetches the part of a model that stages with some layers need (docs/sparse.md)."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import structs

from shoal_common.errors import Corrupt, ShoalError
from shoal_common.identity.seals import SealedList, SealKeeper
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import LeafListSeal, Manifest, ManifestFile
from shoal_common.messages.storage import ReserveResult
from shoal_common.models.safetensors_header import PREFIX_BYTES, header_end
from shoal_common.store import leaf_set
from shoal_common.store.bitmap import LEAF_BYTES
from shoal_common.store.blob_lookup import find_blob
from shoal_common.store.leaf_hash import hash_leaf_list, leaf_list_size
from shoal_common.store.leaf_set import from_bitmap
from shoal_fetcher.cluster_view import ClusterView
from shoal_fetcher.downloads.events import Fetched, Reserved
from shoal_fetcher.downloads.model_fetch import DownloadContext, FileFetcher, LeafListReader, WantedFiles
from shoal_fetcher.errors import BlobHashMismatch, ReservationLost
from shoal_fetcher.partials.bitmap_file import read_bitmap
from shoal_fetcher.partials.disk_writes import map_full_disk_of
from shoal_fetcher.progress import Progress
from shoal_fetcher.sources.leaf_selection import CONFIG, first_leaves, header_leaves, stage_leaves, weight_files

log = StructuredLogger("parts")

_ROUNDS = 3
"""The first leaves, the headers, the tensors."""
LeafLists = Mapping[str, tuple[bytes, LeafListSeal | None]]
"""Leaf hashes by blob, from a list whose seal counts here, and that seal."""


async def sealed_lists(
    manifest: Manifest, cluster_view: ClusterView, lists: LeafListReader, seals: SealKeeper
) -> LeafLists | None:
    """Return the leaf lists of all weight files; None if one is not available, so that leaves cannot be verified.

    A list is trusted by its seal, and where nobody signs by its digest in the manifest of a node that has the model.
    """
    by_blob: dict[str, tuple[bytes, LeafListSeal | None]] = {}
    for file in weight_files(manifest):
        found = None
        if file.sha256 and file.leaf_list_digest:
            found = await _sealed_list(manifest, file, cluster_view, lists, seals)
        if found is None:
            log.info("no sealed leaf list available, fetching the whole model", model=manifest.model, path=file.path)
            return None
        by_blob[file.blob] = found
    return by_blob or None


async def _sealed_list(
    manifest: Manifest, file: ManifestFile, cluster_view: ClusterView, lists: LeafListReader, seals: SealKeeper
) -> tuple[bytes, LeafListSeal | None] | None:
    sealed = SealedList(file.sha256, file.size_bytes, file.leaf_list_digest)
    for holder in cluster_view.holders(file.blob, manifest):
        try:
            hashes, seal = await lists.sealed_leaf_list(holder.node, file.sha256, leaf_list_size(file.size_bytes))
        except ShoalError as e:
            log.info("a node did not return its leaf list", peer=holder.node, path=file.path, reason=e.message)
            continue
        if hash_leaf_list(hashes) == file.leaf_list_digest:
            if not (reason := await asyncio.to_thread(seals.refusal, seal, sealed)):
                return hashes, seal
            log.info("a leaf list does not count", peer=holder.node, path=file.path, reason=reason)
            continue
        log.warning("a node returned a leaf list with the wrong digest", peer=holder.node, path=file.path)
    return None


class ShardFetch:
    """Fetches some layers of one model, in three rounds: each names the leaves that the next one needs."""

    def __init__(
        self,
        manifest: Manifest,
        layers: list[list[int]],
        lists: LeafLists,
        context: DownloadContext,
        progress: Progress,
        files: FileFetcher,
        peer: str,
    ) -> None:
        self._manifest, self._layers, self._lists = manifest, layers, lists
        self._context, self._progress, self._files = context, progress, files
        self._peer = peer
        self._rounds = 0
        self._leaves: dict[str, int] = {}
        self._wanted: WantedFiles = []

    async def reserve(self, again: bool) -> Reserved:
        """Reserve the leaves of this round, of unnamed blobs all."""
        if again:
            self._rounds = 0
        await self._add_leaves()
        reserved = await self._context.storage.reserve(self._manifest, self._leaves)
        if set(reserved.present) >= self._manifest.blob_sizes.keys():
            return Reserved(is_whole_model=True)
        self._wanted = await self._missing(reserved, self._leaves)
        return Reserved()

    async def _add_leaves(self) -> None:
        weights = weight_files(self._manifest)
        if self._rounds == 0:
            self._leaves = first_leaves(self._manifest)
        elif self._rounds == 1:
            for file in weights:
                end = await asyncio.to_thread(self._header_end, file)
                self._leaves[file.blob] |= header_leaves(end, file)
        else:
            self._leaves |= await asyncio.to_thread(self._stage_leaves, weights)

    async def fetch(self) -> Fetched:
        """Fetch the leaves of this round."""
        await self._files.fetch(self._wanted)
        self._rounds += 1
        return Fetched(has_more=self._rounds < _ROUNDS)

    async def seal(self) -> None:
        """Have storage verify the leaves and keep them. Raises BlobHashMismatch if some are corrupt."""
        if self._peer:
            await asyncio.to_thread(self._check_git_names)
        digests = {file.blob: file.leaf_list_digest for file in weight_files(self._manifest)}
        seals = {blob: seal for blob, (_, seal) in self._lists.items() if seal is not None}
        await self._context.storage.seal_shard(self._manifest, self._layers, self._leaves, digests, seals)

    def _check_git_names(self) -> None:
        """Compare small files, which came by a node's sha256, with the hub's git sha1. Raises BlobHashMismatch."""
        for file in self._manifest.files:
            if not file.git_sha1 or not file.sha256:
                continue
            with self._open(file) as f:
                digest = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
                while chunk := f.read(LEAF_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != file.git_sha1:
                raise BlobHashMismatch(f"{file.path} by the manifest of node {self._peer} is not the hub's file")

    async def _missing(self, reserved: ReserveResult, leaves: Mapping[str, int]) -> WantedFiles:
        """Return what to fetch. Counts what is present, and writes the leaf lists beside the partial blobs."""
        progress, present, total_bytes = self._progress, set(reserved.present), 0
        progress.reset_counts()
        missing: WantedFiles = []
        for blob, file in {f.blob: f for f in self._manifest.files}.items():
            wanted = leaves.get(blob)
            needed = leaf_set.all_leaves(file.size_bytes) if wanted is None else wanted
            total_bytes += leaf_set.byte_count(needed, file.size_bytes)
            if blob in present:
                progress.set_blob_complete(blob, blob, file.size_bytes)
                continue
            if not needed and file.size_bytes:
                continue
            directory = self._context.layout.partial(blob)
            if blob in self._lists:
                await asyncio.to_thread(_write_small, self._context.layout.partial_leaves(blob), self._lists[blob][0])
            bitmap = await asyncio.to_thread(read_bitmap, directory, file.size_bytes)
            durable = from_bitmap(bitmap.to_bytes())
            progress.set_durable_bytes(blob, leaf_set.byte_count(durable, file.size_bytes))
            if wanted is None or needed & ~durable:
                missing.append((file, wanted))
        progress.set_state(structs.replace(progress.state, total_bytes=total_bytes))
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
            return find_blob(self._context.layout, file.blob).open("rb")
        except FileNotFoundError:
            pass
        try:
            return (self._context.layout.partial(file.blob) / "data").open("rb")
        except FileNotFoundError:
            raise ReservationLost(f"the reservation of blob {file.blob[:16]}… is gone") from None


def _write_small(path: Path, data: bytes) -> None:
    """Replace a small file, not durably: its digest verifies it. Raises ReservationLost, DiskFull."""
    with map_full_disk_of(path.parent):
        try:
            if path.exists() and path.read_bytes() == data:
                return
            new = path.with_name(f"{path.name}.new")
            new.write_bytes(data)
            new.replace(path)
        except FileNotFoundError:
            raise ReservationLost(f"the reservation of blob {path.parent.name[:16]}… is gone") from None
