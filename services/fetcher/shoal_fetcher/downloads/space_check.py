"""What keeps a full disk full: what storage reports of its space, and whether a block can be written."""

from __future__ import annotations

import asyncio

from shoal_common.errors import DiskFull, ErrorBody
from shoal_common.messages.storage import SpaceCheck
from shoal_common.names import ModelId
from shoal_common.store.store_paths import StorePaths
from shoal_common.units import format_bytes
from shoal_fetcher.errors import ReservationLost
from shoal_fetcher.partials.disk_writes import probe_disk
from shoal_fetcher.storage_client import StorageClient


async def find_shortage(storage: StorageClient, layout: StorePaths, model: ModelId, blob: str) -> ErrorBody | None:
    """Return what still blocks the download of `model` (`org/name@commit`); None if nothing is known to.

    `blob`: the partial blob that could not be written, or "".
    """
    space = await storage.check_space(model)
    if not space.enough:
        return DiskFull(
            f"disk full: {describe_shortage(space)}; free some space and the download resumes",
            lacking_bytes=space.lacking_bytes,
            free_bytes=space.free_bytes,
            headroom_bytes=space.headroom_bytes,
        ).body()
    if blob:
        try:
            await asyncio.to_thread(probe_disk, layout.partial(blob))
        except DiskFull as e:
            return e.body()
        except ReservationLost:
            return None  # it is reserved again
    return None


def describe_shortage(space: SpaceCheck) -> str:
    """Return for people what is missing: `3.2 GB more needed, 0 B free`."""
    free = format_bytes(space.free_bytes)
    if space.out_of_inodes and not space.lacking_bytes:
        return f"the file system has no free inodes, though {free} are free"
    text = f"{format_bytes(space.lacking_bytes)} more needed, {free} free"
    text += f" on {space.volume}" if space.volume else ""
    return text + (f" ({format_bytes(space.headroom_bytes)} of it stay free)" if space.headroom_bytes else "")
