"""Attach and detach volumes as settings change and as their disks are mounted and unmounted."""

from __future__ import annotations

import asyncio
from pathlib import Path

from shoal_common.errors import BadInput, ShoalError
from shoal_common.logs import Log
from shoal_common.messages.storage import FurtherRootState
from shoal_storage.files.real_path import real_root
from shoal_storage.integrity.repair import repairable
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.publisher import Announcer
from shoal_storage.scan.reconciler import Rescan
from shoal_storage.settings import Limits
from shoal_storage.startup import let_go, take_in
from shoal_storage.store.store import Disk
from shoal_storage.store.volume import (
    Away,
    FurtherRoot,
    forget_others,
    open_root,
    refuse_overlap,
    refuse_same_disk,
    remember,
)

log = Log("volumes")

LOOK_S = 5.0
"""Between two checks which volumes are mounted."""


def open_all(disk: Disk, limits: Limits) -> dict[str, str]:
    """Open the mounted volumes, before startup reads them; return the errors of the others, by path. Blocking.

    Raises BadInput for a volume inside, or around, the store, a library or another volume.
    """
    refuse_overlap(limits.roots, limits.read_only_roots, disk.layout.root)
    errors: dict[str, str] = {}
    for path in limits.roots:
        volume = _open(disk, path)
        if isinstance(volume, str):
            errors[path] = volume
            log.error("volume cannot be used; starting without it", volume=path, error=volume)
        else:
            disk.join(volume)
    return errors


def _in_use(disk: Disk) -> list[tuple[str, Path]]:
    """Return the store and its volumes, as names for people and paths."""
    volumes = [(f"the volume {volume.path}", volume.path) for volume in list(disk.further.values())]
    return [(f"the store at {disk.layout.root}", disk.layout.root), *volumes]


def _open(disk: Disk, path: str) -> FurtherRoot | str:
    """Open a volume and record it; return the error message instead if that fails."""
    try:
        volume = open_root(disk.layout, real_root(path), disk.reserve.size_bytes, _in_use(disk))
        try:
            remember(disk.layout, volume)
        except OSError:
            volume.close()
            raise
        return volume
    except ShoalError as e:
        return e.message
    except OSError as e:
        return e.strerror or str(e)
    except Away as e:
        return str(e)


class Joining:
    """Keeps attached volumes, the ledger and the published state in step. `errors` are those of `open_volumes`."""

    def __init__(
        self,
        disk: Disk,
        ledger: Ledger,
        section: asyncio.Lock,
        announcer: Announcer,
        rescan: Rescan,
        limits: Limits,
        errors: dict[str, str],
    ) -> None:
        self._disk, self._ledger, self._section = disk, ledger, section
        self._announcer, self._rescan = announcer, rescan
        self._limits, self._errors = limits, errors
        self._update_lock = asyncio.Lock()
        announcer.further = self.states

    async def use(self, limits: Limits) -> None:
        """Apply new settings: attach and detach volumes accordingly."""
        self._limits = limits
        await self.look()

    def refuse_unusable(self, limits: Limits) -> None:
        """Raise BadInput, Claimed, Unsupported for new volumes that cannot be used; before saving them. Blocking."""
        refuse_overlap(limits.roots, limits.read_only_roots, self._disk.layout.root)
        others = _in_use(self._disk)
        for given_path in limits.roots:
            if given_path in self._limits.roots:
                continue
            path = real_root(given_path)
            try:
                volume = open_root(self._disk.layout, path, others=others)
            except Away as e:
                raise BadInput(f"the volume {given_path} cannot be used: {e}", param="roots") from None
            except OSError as e:
                raise BadInput(f"the volume {given_path} cannot be used: {e.strerror}", param="roots") from None
            volume.close()
            refuse_same_disk(path, others)
            others.append((f"the volume {given_path}", path))

    async def watch(self) -> None:
        """Attach and detach volumes, forever, within seconds of a disk being mounted or unmounted."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except (OSError, ShoalError) as e:
                log.warning("volumes cannot be checked; retrying", error=str(e))

    async def look(self) -> None:
        """Detach volumes that are missing or no longer configured; attach configured ones that are mounted."""
        async with self._update_lock:
            configured = {real_root(given_path): given_path for given_path in self._limits.roots}
            changed = False
            for volume_id, volume in list(self._disk.further.items()):
                if volume.path not in configured or not await asyncio.to_thread(volume.is_there):
                    await self._detach(volume_id, volume.path)
                    changed = True
            if not await asyncio.to_thread(self._disk.is_there):
                return  # the store is missing: volumes cannot be recorded
            await asyncio.to_thread(forget_others, self._disk.layout, configured)
            attached = {volume.path for volume in self._disk.further.values()}
            for path, given_path in configured.items():
                if path not in attached:
                    changed = await self._attach(given_path) or changed
            self._errors = {path: error for path, error in self._errors.items() if path in self._limits.roots}
        if changed:
            await self._rescan.look()
            async with self._section:
                await self._rescan.publish()

    async def _detach(self, volume_id: str, path: Path) -> None:
        async with self._section:
            incomplete = await asyncio.to_thread(let_go, self._disk, self._ledger, volume_id)
            log.warning("volume detached; its models are not offered", volume=path)
            await self._rescan.tell(incomplete, [])

    async def _attach(self, given_path: str) -> bool:
        """Attach a volume; return whether its state has changed, a new error included."""
        volume = await asyncio.to_thread(_open, self._disk, given_path)
        if isinstance(volume, str):
            if self._errors.get(given_path) != volume:
                self._errors[given_path] = volume
                log.error("volume cannot be used", volume=given_path, error=volume)
                return True
            return False
        self._errors.pop(given_path, None)
        async with self._section:
            self._disk.join(volume)
            await asyncio.to_thread(take_in, self._disk, self._ledger, volume.id)
            self._ledger.repairable = await asyncio.to_thread(repairable, self._disk, self._ledger.quarantined)
        log.info("volume attached", volume=volume.path)
        return True

    def states(self) -> list[FurtherRootState]:
        """Return the published state of all configured volumes. Blocking."""
        attached = {volume.path: volume for volume in list(self._disk.further.values())}
        return [self._state(path, attached.get(real_root(path))) for path in self._limits.roots]

    def _state(self, given_path: str, volume: FurtherRoot | None) -> FurtherRootState:
        if volume is None:
            error = self._errors.get(given_path) or "it is not mounted: mount its disk"
            return FurtherRootState(path=given_path, error=error)
        ledger = self._ledger
        blobs = {blob for blob, volume_id in list(ledger.where.items()) if volume_id == volume.id}
        sizes = [ledger.blobs[b] for b in blobs if b in ledger.blobs]
        sizes += [ledger.unproven[b].size_bytes for b in blobs if b in ledger.unproven]
        doubles = [copies.get(volume.id, 0) for copies in list(ledger.doubles.values())]
        partials = {b: p for b, p in list(ledger.partials.items()) if b in blobs}
        shard_bytes = sum(ledger.part_bytes_of(b, p) for b, p in partials.items())
        try:
            free_bytes = volume.free_bytes()
        except OSError:
            free_bytes = 0
        return FurtherRootState(
            path=given_path,
            id=volume.id,
            used_bytes=sum(sizes) + shard_bytes + sum(doubles),
            blob_count=len(sizes),
            free_bytes=free_bytes,
            headroom_bytes=self._limits.headroom_bytes,
            reserved_bytes=sum(ledger.promised_bytes(p) for p in partials.values()) - shard_bytes,
            double_bytes=sum(doubles),
        )
