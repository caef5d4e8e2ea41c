"""Further roots join and leave: as settings change, and as their disks are mounted and unmounted."""

from __future__ import annotations

import asyncio
from pathlib import Path

from shoal_common.errors import BadInput, ShoalError
from shoal_common.logs import Log
from shoal_common.messages.records import FurtherRootState
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger, Limits
from shoal_storage.disk import Disk
from shoal_storage.further import (
    Away,
    FurtherRoot,
    forget_others,
    open_root,
    refuse_overlap,
    refuse_same_disk,
    remember,
)
from shoal_storage.recovery import let_go, take_in
from shoal_storage.repair import repairable
from shoal_storage.rescan import Rescan
from shoal_storage.roots import real_root

log = Log("further")

LOOK_S = 5.0
"""Between two looks whether the roots are there."""


def open_all(disk: Disk, limits: Limits) -> dict[str, str]:
    """At start, before what is in them is read: open those roots that are there. Returns why not, by root. Blocking.

    Raises BadInput for one that is in the store or another root, or around it.
    """
    refuse_overlap(limits.roots, limits.read_only_roots, disk.layout.root)
    errors: dict[str, str] = {}
    for root in limits.roots:
        found = _opened(disk, root)
        if isinstance(found, str):
            errors[root] = found
            log.error("a further root is not used; going on without it", root=root, why=found)
        else:
            disk.join(found)
    return errors


def _others(disk: Disk) -> list[tuple[str, Path]]:
    """What else takes up file systems, as people know it."""
    used = [(f"the further root {root.path}", root.path) for root in list(disk.further.values())]
    return [(f"the store at {disk.layout.root}", disk.layout.root), *used]


def _opened(disk: Disk, root: str) -> FurtherRoot | str:
    try:
        found = open_root(disk.layout, real_root(root), disk.reserve.size_bytes, _others(disk))
        try:
            remember(disk.layout, found)
        except OSError:
            found.close()
            raise
        return found
    except ShoalError as e:
        return e.message
    except OSError as e:
        return e.strerror or str(e)
    except Away as e:
        return str(e)


class Joining:
    """Keeps ledger and cluster as the further roots are. `errors` are those of `open_all`."""

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
        self._one_at_a_time = asyncio.Lock()
        announcer.further = self.states

    async def use(self, limits: Limits) -> None:
        """From now on these are the roots."""
        self._limits = limits
        await self.look()

    def refuse_unusable(self, limits: Limits) -> None:
        """Before they are settings: raise BadInput, Claimed, Unsupported for new roots that are no use. Blocking."""
        refuse_overlap(limits.roots, limits.read_only_roots, self._disk.layout.root)
        others = _others(self._disk)
        for root in limits.roots:
            if root in self._limits.roots:
                continue
            path = real_root(root)
            try:
                found = open_root(self._disk.layout, path, others=others)
            except Away as e:
                raise BadInput(f"the further root {root} cannot be used: {e}", param="roots") from None
            except OSError as e:
                raise BadInput(f"the further root {root} cannot be used: {e.strerror}", param="roots") from None
            found.close()
            refuse_same_disk(path, others)
            others.append((f"the further root {root}", path))

    async def watch(self) -> None:
        """Endlessly: notice within seconds that a disk was mounted or unmounted."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except (OSError, ShoalError) as e:
                log.warning("the further roots could not be looked at", why=str(e))

    async def look(self) -> None:
        """Let go of roots that are not there, or not in the settings any more; take in those that are there."""
        async with self._one_at_a_time:
            roots = {real_root(root): root for root in self._limits.roots}
            changed = False
            for identity, root in list(self._disk.further.items()):
                if root.path not in roots or not await asyncio.to_thread(root.is_there):
                    await self._let_go(identity, root.path)
                    changed = True
            if not await asyncio.to_thread(self._disk.is_there):
                return  # nothing can be noted down
            await asyncio.to_thread(forget_others, self._disk.layout, roots)
            used = {root.path for root in self._disk.further.values()}
            for path, root_as_given in roots.items():
                if path not in used:
                    changed = await self._take_in(root_as_given) or changed
            self._errors = {root: why for root, why in self._errors.items() if root in self._limits.roots}
        if changed:
            await self._rescan.look()
            async with self._section:
                await self._rescan.publish()

    async def _let_go(self, identity: str, path: Path) -> None:
        async with self._section:
            broken = await asyncio.to_thread(let_go, self._disk, self._ledger, identity)
            log.warning("a further root is not used any more; its models are not offered", path=path)
            await self._rescan.tell(broken, [])

    async def _take_in(self, root: str) -> bool:
        found = await asyncio.to_thread(_opened, self._disk, root)
        if isinstance(found, str):
            if self._errors.get(root) != found:
                self._errors[root] = found
                log.error("a further root is not used", root=root, why=found)
                return True
            return False
        self._errors.pop(root, None)
        async with self._section:
            self._disk.join(found)
            await asyncio.to_thread(take_in, self._disk, self._ledger, found.id)
            self._ledger.repairable = await asyncio.to_thread(repairable, self._disk, self._ledger.quarantined)
        log.info("a further root is used", path=found.path)
        return True

    def states(self) -> list[FurtherRootState]:
        """What the cluster is told of the roots. Blocking."""
        by_path = {root.path: root for root in list(self._disk.further.values())}
        return [self._state(root, by_path.get(real_root(root))) for root in self._limits.roots]

    def _state(self, given: str, root: FurtherRoot | None) -> FurtherRootState:
        if root is None:
            return FurtherRootState(path=given, error=self._errors.get(given) or "it is not there: mount its disk")
        ledger = self._ledger
        here = {blob for blob, its in list(ledger.where.items()) if its == root.id}
        sizes = [ledger.blobs[b] for b in here if b in ledger.blobs]
        sizes += [ledger.unproven[b].size_bytes for b in here if b in ledger.unproven]
        doubles = [copies.get(root.id, 0) for copies in list(ledger.doubles.values())]
        arriving = {b: p for b, p in list(ledger.partials.items()) if b in here}
        parts_bytes = sum(ledger.part_bytes_of(b, p) for b, p in arriving.items())
        try:
            free = root.free_bytes()
        except OSError:
            free = 0
        return FurtherRootState(
            path=given,
            id=root.id,
            used_bytes=sum(sizes) + parts_bytes + sum(doubles),
            blob_count=len(sizes),
            free_bytes=free,
            headroom_bytes=self._limits.headroom_bytes,
            reserved_bytes=sum(ledger.promised_bytes(p) for p in arriving.values()) - parts_bytes,
            double_bytes=sum(doubles),
        )
