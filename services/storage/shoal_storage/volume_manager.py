"""Attach and detach volumes as settings change and as their disks are mounted and unmounted."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from shoal_common.concurrency.threads import DaemonCalls, start_daemon_call
from shoal_common.errors import BadInput, ShoalError
from shoal_common.host.file_kinds import wrong_kind
from shoal_common.logs import StructuredLogger
from shoal_common.messages.storage import VolumeState
from shoal_common.settings.node import StorageSettings
from shoal_storage.context import StorageContext
from shoal_storage.files.real_path import resolve_path
from shoal_storage.integrity.repair import repairable_blobs
from shoal_storage.scan.reconciler import StoreReconciler
from shoal_storage.startup import attach_volume, detach_volume, read_blobs
from shoal_storage.store.store import Store
from shoal_storage.store.volume import (
    Volume,
    VolumeMissing,
    open_volume,
    record_volume,
    reject_overlap,
    reject_same_disk,
    remove_unconfigured,
)

log = StructuredLogger("volumes")

CHECK_INTERVAL_S = 5.0
"""Between two checks which volumes are mounted."""
ANSWER_DEADLINE_S = 30.0
"""A volume whose disk does not answer within this is as good as unmounted; one that has to spin up takes 15 s."""


def open_volumes(store: Store, settings: StorageSettings) -> dict[str, str]:
    """Open the mounted volumes, before startup reads them; return the errors of the others, by path. Blocking.

    Raises BadInput for a volume inside, or around, the store, a library or another volume.
    """
    reject_overlap(settings.volumes, settings.libraries, store.layout.root)
    errors: dict[str, str] = {}
    for path in settings.volumes:
        volume = _open(store, path)
        if isinstance(volume, str):
            errors[path] = volume
            log.error("volume cannot be used; starting without it", volume=path, error=volume)
        else:
            store.attach_volume(volume)
    return errors


def _in_use(store: Store) -> list[tuple[str, Path]]:
    """Return the store and its volumes, as names for people and paths."""
    volumes = [(f"the volume {volume.path}", volume.path) for volume in list(store.volumes.values())]
    return [(f"the store at {store.layout.root}", store.layout.root), *volumes]


def _open(store: Store, path: str) -> Volume | str:
    """Open a volume and record it; return the error message instead if that fails."""
    try:
        volume = open_volume(store.layout, resolve_path(path), store.ballast.size_bytes, _in_use(store))
        try:
            record_volume(store.layout, volume)
        except OSError:
            volume.close()
            raise
        return volume
    except ShoalError as e:
        return e.message
    except OSError as e:
        return str(wrong_kind(e) or e.strerror or e)
    except VolumeMissing as e:
        return str(e)


class VolumeManager:
    """Keeps attached volumes, the ledger and the published state in step. `errors` are those of `open_volumes`."""

    def __init__(self, context: StorageContext, reconciler: StoreReconciler, errors: dict[str, str]) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._reconciler, self._errors = reconciler, errors
        self._update_lock = asyncio.Lock()
        self._calls, self._opening = DaemonCalls(), dict[str, asyncio.Future[Volume | str]]()

    def reject_unusable(self, settings: StorageSettings) -> None:
        """Raise BadInput, AlreadyRunning or Unsupported for unusable new volumes, before saving them. Blocking."""
        reject_overlap(settings.volumes, settings.libraries, self._store.layout.root)
        others = _in_use(self._store)
        for given_path in settings.volumes:
            if given_path in self._context.settings.volumes:
                continue
            path = resolve_path(given_path)
            try:
                volume = open_volume(self._store.layout, path, others=others)
            except VolumeMissing as e:
                raise BadInput(f"the volume {given_path} cannot be used: {e}", param="volumes") from None
            except OSError as e:
                raise BadInput(f"the volume {given_path} cannot be used: {e.strerror}", param="volumes") from None
            volume.close()
            reject_same_disk(path, others)
            others.append((f"the volume {given_path}", path))

    async def watch_forever(self) -> None:
        """Attach and detach volumes, forever, within seconds of a disk being mounted or unmounted."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            try:
                await self.update()
            except (OSError, ShoalError) as e:
                log.warning("volumes cannot be checked; retrying", error=str(e))

    async def update(self) -> None:
        """Detach volumes that are missing or no longer configured; attach configured ones that are mounted."""
        async with self._update_lock:
            given_paths = self._context.settings.volumes
            configured = {await self._resolve(given_path): given_path for given_path in given_paths}
            changed = False
            for volume_id, volume in list(self._store.volumes.items()):
                if volume.path not in configured or not await self._is_mounted(volume):
                    await self._detach(volume_id, volume.path)
                    changed = True
            if not await asyncio.to_thread(self._store.is_present):
                return  # the store is missing: volumes cannot be recorded
            await asyncio.to_thread(remove_unconfigured, self._store.layout, configured)
            attached = {volume.path for volume in self._store.volumes.values()}
            for path, given_path in configured.items():
                if path not in attached:
                    changed = await self._attach(given_path) or changed
            self._errors = {path: error for path, error in self._errors.items() if path in given_paths}
        if changed:
            await self._reconciler.scan()
            await self._context.publishing.publish_soon()

    async def _resolve(self, given_path: str) -> Path:
        """Return the path with symbolic links resolved; as it is given while its disk does not answer."""
        try:
            return await self._calls.run(
                ("resolve", given_path), partial(resolve_path, given_path), ANSWER_DEADLINE_S
            )
        except TimeoutError:
            return Path(given_path)

    async def _is_mounted(self, volume: Volume) -> bool:
        try:
            return await self._calls.run(("is mounted", volume.id), volume.is_mounted, ANSWER_DEADLINE_S)
        except TimeoutError:
            return False

    async def _open(self, given_path: str) -> Volume | str:
        """Open a volume. What opens after the deadline is found at the next attempt."""
        opening = self._opening.pop(given_path, None) or start_daemon_call(_open, self._store, given_path)
        if (await asyncio.wait({opening}, timeout=ANSWER_DEADLINE_S))[0]:
            return opening.result()
        self._opening[given_path] = opening
        return "its disk does not answer"

    async def _detach(self, volume_id: str, path: Path) -> None:
        async with self._context.section as held:
            incomplete = await asyncio.to_thread(detach_volume, self._store, self._ledger, volume_id)
            log.warning("volume detached; its models are not offered", volume=path)
            changes = await self._reconciler.settle(held, incomplete, [])
        await self._reconciler.report(changes)

    async def _attach(self, given_path: str) -> bool:
        """Attach a volume; return whether its state has changed, a new error included."""
        volume = await self._open(given_path)
        if isinstance(volume, str):
            if self._errors.get(given_path) != volume:
                self._errors[given_path] = volume
                log.error("volume cannot be used", volume=given_path, error=volume)
                return True
            return False
        self._errors.pop(given_path, None)
        blobs = await asyncio.to_thread(read_blobs, volume)  # nobody else writes to it yet
        async with self._context.section as held:
            held.require()
            self._store.attach_volume(volume)
            await asyncio.to_thread(attach_volume, self._store, self._ledger, volume.id, blobs)
            repairable = await asyncio.to_thread(repairable_blobs, self._store, self._ledger.quarantined)
            self._ledger.set_repairable(repairable)
        log.info("volume attached", volume=volume.path)
        return True

    def states(self) -> list[VolumeState]:
        """Return the published state of all configured volumes. Blocking."""
        attached = {volume.path: volume for volume in list(self._store.volumes.values())}
        return [self._state(path, attached.get(resolve_path(path))) for path in self._context.settings.volumes]

    def _state(self, given_path: str, volume: Volume | None) -> VolumeState:
        if volume is None:
            error = self._errors.get(given_path) or "it is not mounted: mount its disk"
            return VolumeState(path=given_path, error=error)
        ledger = self._ledger
        blobs = {blob for blob, volume_id in list(ledger.volume_by_blob.items()) if volume_id == volume.id}
        sizes = [ledger.blobs[b] for b in blobs if b in ledger.blobs]
        sizes += [ledger.unverified[b].size_bytes for b in blobs if b in ledger.unverified]
        duplicate_sizes = [copies.get(volume.id, 0) for copies in list(ledger.redundant_copies.values())]
        partials = {b: p for b, p in list(ledger.arrivals.partials.items()) if b in blobs}
        shard_bytes = sum(ledger.shard_bytes_of(b, p) for b, p in partials.items())
        try:
            free_bytes = volume.free_bytes()
        except OSError:
            free_bytes = 0
        return VolumeState(
            path=given_path,
            id=volume.id,
            used_bytes=sum(sizes) + shard_bytes + sum(duplicate_sizes),
            blob_count=len(sizes),
            free_bytes=free_bytes,
            headroom_bytes=self._context.settings.headroom_bytes,
            reserved_bytes=sum(ledger.arrivals.reserved_bytes_of(p) for p in partials.values()) - shard_bytes,
            duplicate_bytes=sum(duplicate_sizes),
        )
