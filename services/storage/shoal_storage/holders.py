"""Who holds leases: answers `lease` and `unlease`, and notices which leases have ended."""

from __future__ import annotations

import asyncio
import os
import time

from shoal_common import leafset
from shoal_common.errors import DISK_FULL, Busy, Failed, InUse, NotFound
from shoal_common.logs import Log
from shoal_common.messages.questions import AskLease, Done, Leased, Unlease
from shoal_common.names import ModelRef, check_holder, check_id
from shoal_common.service import Context
from shoal_storage import lease_disk
from shoal_storage.announce import Announcer
from shoal_storage.decide import Ledger, matching, part_for
from shoal_storage.disk import Disk
from shoal_storage.leases import GRACE_S, LEASES_AT_MOST, Lease, has_ended, words_of
from shoal_storage.parts import Parts

log = Log("leases")

_LOOK_S = 3.0
_ID_BYTES = 8


class Holders:
    """Keeps `leases` of the ledger and the directories on the disk alike."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        section: asyncio.Lock,
        parts: Parts,
        announcer: Announcer,
    ) -> None:
        self._node, self._disk, self._ledger = context.node, disk, ledger
        self._section, self._parts, self._announcer = section, parts, announcer
        self._any = asyncio.Event()
        if ledger.leases:
            self._any.set()

    # Questions

    async def lease(self, question: AskLease) -> Leased:
        """A view for one caller, kept while it holds the lock. Raises NotFound, Busy, and Failed on a full disk."""
        ref, holder = ModelRef.parse(question.model), check_holder(question.holder)
        instance = check_id(question.instance) if question.instance else ""
        async with self._section:
            await self.look()
            if len(self._ledger.leases) >= LEASES_AT_MOST:
                raise Busy(
                    f"node {self._node} has {LEASES_AT_MOST} leases, which is the most: see who holds them with "
                    "`shoal storage`, end some, and ask again"
                )
            found = matching(ref.repo, ref.revision, self._ledger.whole.values())
            part = None if found else part_for(ref, question.layers, self._ledger)
            if not found and part is None:
                what = f"layers {question.layers} of {ref} are" if question.layers else f"{ref} is"
                raise NotFound(f"{what} not on node {self._node}, and only what is there can be leased: pull it")
            if part is not None:
                await self._parts.require(part)
            manifest = part.manifest if part else found[-1]
            leaves = part.leaves if part else {}
            lease = Lease(
                id=os.urandom(_ID_BYTES).hex(),
                model=manifest.model,
                holder=holder,
                instance=instance,
                since_s=time.time(),
                files={f.path: f.sha256 for f in manifest.files if leaves.get(f.sha256) != 0},
                grace_until_s=time.monotonic() + GRACE_S,
                arriving=frozenset(leaves),
            )
            try:
                await asyncio.to_thread(lease_disk.make, self._disk, lease)
            except FileNotFoundError as e:
                if part is not None:
                    await self._parts.drop(manifest.model)
                raise NotFound(
                    f"{manifest.model} on node {self._node} has lost files ({e.filename}): pull it again"
                ) from None
            except OSError as e:
                if e.errno in DISK_FULL:
                    raise  # the reserve may help
                raise Failed(
                    f"a view of {manifest.model} could not be made on node {self._node} ({e.strerror}); free some "
                    "space and try again"
                ) from None
            self._ledger.leases[lease.id] = lease
            self._any.set()
        await self._announcer.publish()
        log.info("leased", model=lease.model, lease=lease.id, holder=holder)
        lay = self._disk.layout
        return Leased(
            id=lease.id,
            commit=manifest.commit,
            view=str(lay.lease_view(lease.id)),
            lock=str(lay.lease_lock(lease.id)),
            leaves={f.path: leafset.ranges(leaves[f.sha256]) for f in manifest.files if leaves.get(f.sha256)},
        )

    async def unlease(self, question: Unlease) -> Done:
        """End a lease at once. Gone already is fine; one whose lock is held is in use whoever asks (I4)."""
        name = check_id(question.id)
        async with self._section:
            if not await asyncio.to_thread(lease_disk.remove, self._disk, name):
                lease = self._ledger.leases.get(name)
                raise InUse(
                    f"lease {name} on node {self._node} is held by {words_of(lease) if lease else 'somebody'}: "
                    "close its lock first"
                )
            gone = self._ledger.leases.pop(name, None)
        if gone is not None:
            await self._announcer.publish()
            log.info("lease was given back", model=gone.model, lease=name, holder=gone.holder)
        return Done()

    # Around

    async def look(self) -> bool:
        """See who lives, and remove the leases that have ended. Within the section. Whether anything has changed."""
        leases, changed = self._ledger.leases, False
        seen = await asyncio.to_thread(lease_disk.look, self._disk.layout, list(leases)) if leases else {}
        for name, (held, pid) in seen.items():
            lease = leases[name]
            changed = changed or pid != lease.pid
            lease.pid = pid
            if not has_ended(lease, held, time.monotonic()):
                lease.held = lease.held or held
            elif await self._end(lease):
                changed = True
        if not leases:
            self._any.clear()
        return changed

    async def _end(self, lease: Lease) -> bool:
        try:
            if not await asyncio.to_thread(lease_disk.remove, self._disk, lease.id):
                return False  # taken up just now
        except OSError as e:
            log.warning("a lease that has ended stays for now", lease=lease.id, why=e.strerror)
            return False
        del self._ledger.leases[lease.id]
        log.info("a lease has ended", model=lease.model, lease=lease.id, holder=lease.holder)
        return True

    async def watch(self) -> None:
        """Notice within seconds that a holder has gone. Silent while nothing changes, asleep while there is none."""
        while True:
            await self._any.wait()
            async with self._section:
                changed = await self.look()
            if changed:
                await self._announcer.publish()
            await asyncio.sleep(_LOOK_S)
