"""The lease service: answers `lease` and `unlease`, and removes leases that have ended."""

from __future__ import annotations

import asyncio
import os
import time

from shoal_common.errors import DISK_FULL, Busy, Failed, InUse, NotFound
from shoal_common.logs import Log
from shoal_common.messages.envelope import Done
from shoal_common.messages.leases import AskLease, Leased, Unlease
from shoal_common.names import ModelRef, check_holder, check_id
from shoal_common.service import Context
from shoal_common.store import leaf_set
from shoal_storage.leases import lease_files
from shoal_storage.ledger.lease import GRACE_S, LEASES_AT_MOST, Lease, has_ended, words_of
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import matching, part_for
from shoal_storage.publisher import Announcer
from shoal_storage.shards import Parts
from shoal_storage.store.store import Disk

log = Log("leases")

_CHECK_INTERVAL_S = 3.0
_ID_BYTES = 8


class Holders:
    """Keeps the ledger's `leases` and the lease directories on disk in step."""

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
        self._has_leases = asyncio.Event()
        if ledger.leases:
            self._has_leases.set()

    # Requests

    async def lease(self, question: AskLease) -> Leased:
        """Return a view for one caller, kept while it holds the lock. Raises NotFound, Busy, Failed, OSError."""
        ref, holder = ModelRef.parse(question.model), check_holder(question.holder)
        instance = check_id(question.instance) if question.instance else ""
        async with self._section:
            await self.look()
            if len(self._ledger.leases) >= LEASES_AT_MOST:
                raise Busy(
                    f"node {self._node} has the maximum of {LEASES_AT_MOST} leases: see who holds them with "
                    "`shoal storage`, end some and try again"
                )
            complete = matching(ref.repo, ref.revision, self._ledger.whole.values())
            shard = None if complete else part_for(ref, question.layers, self._ledger)
            if not complete and shard is None:
                missing = f"layers {question.layers} of {ref} are" if question.layers else f"{ref} is"
                raise NotFound(f"{missing} not on node {self._node}: pull it there first with `shoal pull`")
            if shard is not None:
                await self._parts.require(shard)
            manifest = shard.manifest if shard else complete[-1]
            leaves = shard.leaves if shard else {}
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
                await asyncio.to_thread(lease_files.make, self._disk, lease)
            except FileNotFoundError as e:
                if shard is not None:
                    await self._parts.drop(manifest.model)
                raise NotFound(
                    f"{manifest.model} on node {self._node} is missing files ({e.filename}): pull it again"
                ) from None
            except OSError as e:
                if e.errno in DISK_FULL:
                    raise  # freeing the ballast file may help
                raise Failed(
                    f"cannot build a view of {manifest.model} on node {self._node} ({e.strerror}): free some space "
                    "and try again"
                ) from None
            self._ledger.leases[lease.id] = lease
            self._has_leases.set()
        await self._announcer.publish()
        log.info("lease granted", model=lease.model, lease=lease.id, holder=holder)
        paths = self._disk.layout
        return Leased(
            id=lease.id,
            commit=manifest.commit,
            view=str(paths.lease_view(lease.id)),
            lock=str(paths.lease_lock(lease.id)),
            leaves={f.path: leaf_set.ranges(leaves[f.sha256]) for f in manifest.files if leaves.get(f.sha256)},
        )

    async def unlease(self, question: Unlease) -> Done:
        """End a lease at once; an absent lease is fine. Raises InUse while its lock is held, whoever asks (I4)."""
        name = check_id(question.id)
        async with self._section:
            if not await asyncio.to_thread(lease_files.remove, self._disk, name):
                lease = self._ledger.leases.get(name)
                raise InUse(
                    f"lease {name} on node {self._node} is held by {words_of(lease) if lease else 'somebody'}: "
                    "close its lock file first"
                )
            ended = self._ledger.leases.pop(name, None)
        if ended is not None:
            await self._announcer.publish()
            log.info("lease returned", model=ended.model, lease=name, holder=ended.holder)
        return Done()

    # Expiry

    async def look(self) -> bool:
        """Refresh which leases are held, remove ended ones; return whether any changed. In the critical section."""
        leases, changed = self._ledger.leases, False
        status = await asyncio.to_thread(lease_files.look, self._disk.layout, list(leases)) if leases else {}
        for name, (held, pid) in status.items():
            lease = leases[name]
            changed = changed or pid != lease.pid
            lease.pid = pid
            if not has_ended(lease, held, time.monotonic()):
                lease.held = lease.held or held
            elif await self._end(lease):
                changed = True
        if not leases:
            self._has_leases.clear()
        return changed

    async def _end(self, lease: Lease) -> bool:
        try:
            if not await asyncio.to_thread(lease_files.remove, self._disk, lease.id):
                return False  # its lock was taken just now
        except OSError as e:
            log.warning("ended lease cannot be removed; retrying", lease=lease.id, error=e.strerror)
            return False
        del self._ledger.leases[lease.id]
        log.info("lease ended", model=lease.model, lease=lease.id, holder=lease.holder)
        return True

    async def watch(self) -> None:
        """Remove, forever, leases whose holder has exited, within seconds. Idle while there are no leases."""
        while True:
            await self._has_leases.wait()
            async with self._section:
                changed = await self.look()
            if changed:
                await self._announcer.publish()
            await asyncio.sleep(_CHECK_INTERVAL_S)
