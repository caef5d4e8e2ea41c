"""Bringing in what stages with some layers need of a model, and no more (docs/sparse.md)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shoal_common import leafset
from shoal_common.blobs import find_blob
from shoal_common.errors import DISK_FULL, Corrupt, DiskFull, ShoalError
from shoal_common.layout import Layout
from shoal_common.leaves import list_bytes, root_of
from shoal_common.logs import Log
from shoal_common.messages.questions import Reserved
from shoal_common.messages.records import Manifest, ManifestFile
from shoal_common.runs import from_bitmap
from shoal_common.tensors import PREFIX_BYTES, header_end
from shoal_fetcher.errors import ReservationLost, WrongWhole
from shoal_fetcher.partial import read_bitmap
from shoal_fetcher.progress import Progress
from shoal_fetcher.sparse import CONFIG, first_leaves, header_leaves, stage_leaves, weight_files
from shoal_fetcher.storage import Storage
from shoal_fetcher.surroundings import Surroundings

log = Log("parts")

_TRIES = 3
"""How often leaves may come that are not what the sealed list says, before the part is given up."""

Fetch = Callable[[list[tuple[ManifestFile, int | None]]], Awaitable[None]]
"""Makes these files present, or the given leaves of them."""
LeafLists = Mapping[str, bytes]
"""By blob, the hashes of its leaves, from a list whose root is sealed."""


class Lists(Protocol):
    """Who reads leaf lists from nodes."""

    async def leaf_list(self, node: str, blob: str, start: int, size_bytes: int) -> bytes:
        """Bytes of the list of a blob as a node gives it. Raises ShoalError."""


async def sealed_lists(manifest: Manifest, around: Surroundings, lists: Lists) -> LeafLists | None:
    """The lists of all files with weights; None when one of them is not to be had, and so nothing can be proven.

    A list is believed by its root, which the manifest of a node that has the model says.
    """
    found: dict[str, bytes] = {}
    for file in weight_files(manifest):
        hashes = await _sealed_list(manifest, file, around, lists) if file.sha256 and file.leaves else None
        if hashes is None:
            log.info("no sealed leaf list is to be had", model=manifest.model, path=file.path)
            return None
        found[file.blob] = hashes
    return found or None


async def _sealed_list(manifest: Manifest, file: ManifestFile, around: Surroundings, lists: Lists) -> bytes | None:
    for holding in around.holders(file.blob, manifest):
        try:
            hashes = await lists.leaf_list(holding.node, file.sha256, 0, list_bytes(file.size_bytes))
        except ShoalError as e:
            log.info("a node could not give its leaf list", peer=holding.node, path=file.path, why=e.message)
            continue
        if root_of(hashes) == file.leaves:
            return hashes
        log.warning("a node gave a leaf list that is not the sealed one", peer=holding.node, path=file.path)
    return None


class PartFetch:
    """One model's layers on their way to this node."""

    def __init__(
        self,
        manifest: Manifest,
        layers: list[list[int]],
        lists: LeafLists,
        layout: Layout,
        storage: Storage,
        progress: Progress,
        fetch: Fetch,
    ) -> None:
        self._manifest, self._layers, self._lists = manifest, layers, lists
        self._layout, self._storage, self._progress, self._fetch = layout, storage, progress, fetch

    async def bring_in(self) -> bool:
        """Make the part present. False: all of the model is here. Raises what storage and sources raise."""
        manifest, files = self._manifest, weight_files(self._manifest)
        for attempt in range(1, _TRIES + 1):
            leaves = first_leaves(manifest)
            if await self._bring(leaves):
                return False
            for file in files:
                end = await asyncio.to_thread(self._header_end, file)
                leaves[file.blob] |= header_leaves(end, file)
            await self._bring(leaves)
            leaves |= await asyncio.to_thread(self._needed, files)
            await self._bring(leaves)
            await self._progress.say(phase="verifying", waiting_for="storage")
            roots = {file.blob: file.leaves for file in files}
            try:
                await self._storage.seal_part(manifest, self._layers, leaves, roots)
            except WrongWhole as e:
                if attempt == _TRIES:
                    raise
                log.warning("wrong leaves have arrived; all of that blob comes anew", why=e.message)
                continue
            return True
        raise AssertionError("the last attempt returns or raises")

    async def _bring(self, leaves: Mapping[str, int]) -> bool:
        """Reserve these leaves, of blobs not named all, and have them fetched. Whether all of the model is here."""
        await self._progress.say(phase="reserving", waiting_for="storage")
        reserved = await self._storage.reserve(self._manifest, leaves)
        here = set(reserved.present)
        if here >= self._manifest.blob_sizes.keys():
            return True
        missing = await self._missing(reserved, leaves)
        await self._progress.say(phase="fetching", waiting_for="")
        await self._fetch(missing)
        return False

    async def _missing(self, reserved: Reserved, leaves: Mapping[str, int]) -> list[tuple[ManifestFile, int | None]]:
        """What is to be fetched. What is here is counted, and the lists are written beside the partials."""
        progress, here, total_bytes = self._progress, set(reserved.present), 0
        progress.restart()
        missing: list[tuple[ManifestFile, int | None]] = []
        for blob, file in {f.blob: f for f in self._manifest.files}.items():
            wanted = leaves.get(blob)
            needed = leafset.whole(file.size_bytes) if wanted is None else wanted
            total_bytes += leafset.size_of(needed, file.size_bytes)
            if blob in here:
                progress.whole(blob, blob, file.size_bytes)
                continue
            if not needed and file.size_bytes:
                continue
            directory = self._layout.partial(blob)
            if blob in self._lists:
                await asyncio.to_thread(_put, self._layout.partial_leaves(blob), self._lists[blob])
            bitmap = await asyncio.to_thread(read_bitmap, directory, file.size_bytes)
            durable = from_bitmap(bitmap.to_bytes())
            progress.durable(blob, leafset.size_of(durable, file.size_bytes))
            if wanted is None or needed & ~durable:
                missing.append((file, wanted))
        progress.total(total_bytes)
        return missing

    def _header_end(self, file: ManifestFile) -> int:
        with self._open(file) as f:
            return header_end(f.read(PREFIX_BYTES), file.path)

    def _needed(self, files: list[ManifestFile]) -> dict[str, int]:
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
            raise Corrupt(f"{self._manifest.model} has no {CONFIG} that can be read") from None
        return config

    def _open(self, file: ManifestFile) -> BinaryIO:
        """A file that is here, or arriving."""
        try:
            return find_blob(self._layout, file.blob).open("rb")
        except FileNotFoundError:
            pass
        try:
            return (self._layout.partial(file.blob) / "data").open("rb")
        except FileNotFoundError:
            raise ReservationLost(f"the reservation of blob {file.blob[:16]}… has gone") from None


def _put(path: Path, data: bytes) -> None:
    """Write a small file, old or new, not durably: its root proves it. Raises ReservationLost, DiskFull."""
    try:
        if path.exists() and path.read_bytes() == data:
            return
        new = path.with_name(f"{path.name}.new")
        new.write_bytes(data)
        new.replace(path)
    except FileNotFoundError:
        raise ReservationLost(f"the reservation of blob {path.parent.name[:16]}… has gone") from None
    except OSError as e:
        if e.errno not in DISK_FULL:
            raise
        blob = path.parent.name
        raise DiskFull(
            f"disk full: {e.strerror} while blob {blob[:16]}… arrived; free some space and it goes on by itself",
            blob=blob,
        ) from None
