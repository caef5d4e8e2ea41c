"""The lease service: answers `lease` and `unlease`, and removes leases that have ended."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping

from shoal_common.errors import DISK_FULL, Busy, InternalError, InUse, NotFound
from shoal_common.logs import StructuredLogger
from shoal_common.messages.envelope import Empty
from shoal_common.messages.leases import AcquireLease, LeaseGrant, ReleaseLease
from shoal_common.messages.manifest import Manifest
from shoal_common.names import ModelRef, check_holder, check_id
from shoal_common.store import leaf_set
from shoal_storage.context import StorageContext
from shoal_storage.leases import lease_files
from shoal_storage.ledger.lease import LOCK_DEADLINE_S, MAX_LEASES, ModelLease, describe_holder, has_ended
from shoal_storage.ledger.references import find_shard, matching_manifests
from shoal_storage.section import Held
from shoal_storage.shards import ShardService

log = StructuredLogger("leases")

_CHECK_INTERVAL_S = 3.0
_ID_BYTES = 8


class LeaseService:
    """Keeps the ledger's `leases` and the lease directories on disk in step."""

    def __init__(self, context: StorageContext, shards: ShardService) -> None:
        self._context, self._node, self._shards = context, context.node, shards
        self._store, self._ledger = context.store, context.ledger
        self._has_leases = asyncio.Event()
        if context.ledger.uses.leases:
            self._has_leases.set()

    # Requests

    async def lease(self, request: AcquireLease) -> LeaseGrant:
        """Return a view for one caller, kept while it holds the lock. Raises NotFound, Busy, Failed, OSError."""
        ref, holder = ModelRef.parse(request.model), check_holder(request.holder)
        instance = check_id(request.instance) if request.instance else ""
        try:
            async with self._context.section as held:
                lease, manifest, leaves = await self._grant(held, ref, request, holder, instance)
        finally:
            await self._context.publishing.publish_soon()  # a shard that lost leaves is dropped
        log.info("lease granted", model=lease.model, lease=lease.id, holder=holder)
        paths = self._store.layout
        return LeaseGrant(
            id=lease.id,
            commit=manifest.commit,
            view=str(paths.lease_view(lease.id)),
            lock=str(paths.lease_lock(lease.id)),
            leaf_ranges={
                f.path: leaf_set.to_ranges(leaves[f.sha256]) for f in manifest.files if leaves.get(f.sha256)
            },
        )

    async def _grant(
        self, held: Held, ref: ModelRef, request: AcquireLease, holder: str, instance: str
    ) -> tuple[ModelLease, Manifest, Mapping[str, int]]:
        """Create a lease. Returns it, the manifest of its model, and of a shard the leaves by blob."""
        await self.refresh(held)
        if len(self._ledger.uses.leases) >= MAX_LEASES:
            raise Busy(
                f"node {self._node} has the maximum of {MAX_LEASES} leases: see who holds them with "
                "`shoal storage`, end some and try again"
            )
        complete = matching_manifests(ref.repo, ref.revision, self._ledger.complete_manifests.values())
        shard = None if complete else find_shard(ref, request.layers, self._ledger)
        if not complete and shard is None:
            missing = f"layers {request.layers} of {ref} are" if request.layers else f"{ref} is"
            raise NotFound(f"{missing} not on node {self._node}: pull it there first with `shoal pull`")
        if shard is not None:
            await self._shards.require_complete(held, shard)
        manifest = shard.manifest if shard else complete[-1]
        leaves = shard.leaves if shard else {}
        lease = ModelLease(
            id=os.urandom(_ID_BYTES).hex(),
            model=manifest.model,
            holder=holder,
            instance=instance,
            since_s=time.time(),
            files={f.path: f.sha256 for f in manifest.files if leaves.get(f.sha256) != 0},
            grace_until_s=time.monotonic() + LOCK_DEADLINE_S,
            partial_blobs=frozenset(leaves),
        )
        try:
            await asyncio.to_thread(lease_files.create_lease, self._store, lease)
        except FileNotFoundError as e:
            if shard is not None:
                await self._shards.drop(held, manifest.model)
            raise NotFound(
                f"{manifest.model} on node {self._node} is missing files ({e.filename}): pull it again"
            ) from None
        except OSError as e:
            if e.errno in DISK_FULL:
                raise  # freeing the ballast file may help
            raise InternalError(
                f"cannot build a view of {manifest.model} on node {self._node} ({e.strerror}): free some space "
                "and try again"
            ) from None
        self._ledger.uses.add_lease(lease)
        self._has_leases.set()
        return lease, manifest, leaves

    async def release(self, request: ReleaseLease) -> Empty:
        """End a lease at once; an absent lease is fine. Raises InUse while its lock is held, whoever asks (I4)."""
        name = check_id(request.id)
        async with self._context.section as held:
            held.require()
            if not await asyncio.to_thread(lease_files.remove_unless_held, self._store, name):
                lease = self._ledger.uses.leases.get(name)
                raise InUse(
                    f"lease {name} on node {self._node} is held by "
                    f"{describe_holder(lease) if lease else 'somebody'}: "
                    "close its lock file first"
                )
            ended = self._ledger.uses.end_lease(name)
        if ended is not None:
            await self._context.publishing.publish_soon()
            log.info("lease returned", model=ended.model, lease=name, holder=ended.holder)
        return Empty()

    # Expiry

    async def refresh(self, held: Held) -> bool:
        """Refresh which leases are held, remove ended ones; return whether any changed."""
        held.require()
        leases, changed = self._ledger.uses.leases, False
        status = await asyncio.to_thread(lease_files.check_locks, self._store.layout, list(leases)) if leases else {}
        for name, (is_held, pid) in status.items():
            changed = changed or pid != leases[name].pid
            lease = self._ledger.uses.record_lock(name, is_held, pid)
            if has_ended(lease, is_held, time.monotonic()) and await self._end(held, lease):
                changed = True
        if not leases:
            self._has_leases.clear()
        return changed

    async def _end(self, held: Held, lease: ModelLease) -> bool:
        held.require()
        try:
            if not await asyncio.to_thread(lease_files.remove_unless_held, self._store, lease.id):
                return False  # its lock was taken just now
        except OSError as e:
            log.warning("ended lease cannot be removed; retrying", lease=lease.id, error=e.strerror)
            return False
        self._ledger.uses.end_lease(lease.id)
        log.info("lease ended", model=lease.model, lease=lease.id, holder=lease.holder)
        return True

    async def expire_forever(self) -> None:
        """Remove, forever, leases whose holder has exited, within seconds. Idle while there are no leases."""
        while True:
            await self._has_leases.wait()
            async with self._context.section as held:
                changed = await self.refresh(held)
            if changed:
                self._context.publishing.notify()
            await asyncio.sleep(_CHECK_INTERVAL_S)
