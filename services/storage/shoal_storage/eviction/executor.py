"""Frees space: plans eviction from the current state and carries it out step by step. Only within the section."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

from msgspec import structs

from shoal_common.errors import QuotaExceeded, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import EvictionPlan, Victim
from shoal_common.service import ServiceContext
from shoal_common.settings.node import StorageSettings
from shoal_common.units import format_bytes
from shoal_storage.admission.admission import Admission, SpaceDemand, admit, space_demand
from shoal_storage.admission.allocator import VolumeSpace
from shoal_storage.eviction.planner import (
    IsEnough,
    find_garbage,
    plan_eviction,
    protected_models,
    removable_copies,
    with_eviction_hint,
)
from shoal_storage.leases.last_use import UsageView
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import referenced_blobs
from shoal_storage.ledger.usage import join_names
from shoal_storage.publisher import StatePublisher
from shoal_storage.store.commit import delete_blob, delete_copy
from shoal_storage.store.partials import refresh_partial
from shoal_storage.store.store import Store

log = StructuredLogger("storage")

_MAX_PLANS = 5
_FREED_DEADLINE_S = 5.0
"""How long a file system may take to release the space of deleted files."""
_FREED_POLL_S = 0.1


class EvictionExecutor:
    """Plans and carries out evictions. `remove` takes a model off disk and ledger and returns the bytes freed."""

    def __init__(
        self,
        context: ServiceContext,
        store: Store,
        ledger: Ledger,
        settings: StorageSettings,
        usage: UsageView,
        publisher: StatePublisher,
        remove: Callable[[str], Awaitable[int]],
    ) -> None:
        self._context, self._store, self._ledger = context, store, ledger
        self.settings = settings
        self._usage, self._publisher, self._remove = usage, publisher, remove

    async def refresh_free_space(self) -> list[VolumeSpace]:
        """Return the free space of each file system, its ballast included, the store's first. Refreshes the partial
        blobs' allocated bytes before.
        """
        for blob in list(self._ledger.arrivals.partials):
            await asyncio.to_thread(refresh_partial, self._store, blob, self._ledger)
        return await asyncio.to_thread(free_space_by_volume, self._store, self._ledger.arrivals.in_flight_by_volume)

    async def plan_for_new_bytes(self, new_bytes: int) -> EvictionPlan:
        """Return what would be evicted for so many new bytes, as one blob. Changes nothing."""
        demand, spaces = SpaceDemand({"": new_bytes}, {}, new_bytes), await self.refresh_free_space()
        need_bytes = demand.shortfall(self._ledger, self.settings, spaces).required_bytes
        return await self.plan_to_free(need_bytes, demand.met_after_freeing(self._ledger, self.settings, spaces))

    async def plan_to_free(self, need_bytes: int, enough: IsEnough, admitted_model: str = "") -> EvictionPlan:
        """Return what would be evicted to free so many bytes where `enough` needs them. The admitted model stays.

        Changes nothing.
        """
        ledger = self._ledger
        protected = protected_models(ledger, await self._usage.current_users(), admitted_model)
        eviction = plan_eviction(need_bytes, ledger, ledger.uses.last_uses, protected, enough)
        if admitted_model not in ledger.local_manifests:
            protected.pop(admitted_model, None)  # nothing to protect yet: a dry run before the request says the same
        return structs.replace(eviction, protected=protected)

    async def admit(
        self, manifest: Manifest, leaves: Mapping[str, int] | None = None
    ) -> tuple[Admission, EvictionPlan | None]:
        """Approve a manifest, evicting if the policy allows. Returns what was evicted. Raises QuotaExceeded.

        The manifest must be reserved already, or its own blobs could be evicted to make space for it.
        """
        evicted: EvictionPlan | None = None
        for _ in range(_MAX_PLANS):
            spaces = await self.refresh_free_space()
            try:
                return self._admit(manifest, spaces, leaves), evicted
            except QuotaExceeded as refusal:
                if evicted is not None and evicted.enough:
                    if not await self.wait_space_released(lambda: self._admits(manifest, leaves)):
                        raise self._not_released(refusal, evicted) from None
                    continue
                enough = space_demand(manifest, self._ledger, leaves).met_after_freeing(
                    self._ledger, self.settings, spaces
                )
                eviction = await self.plan_to_free(
                    refusal.details["shortfall_bytes"], enough, admitted_model=manifest.model
                )
                if (policy := self.settings.eviction_policy) != "lru" or not eviction.enough:
                    raise with_eviction_hint(refusal, eviction, policy) from None
            latest = await self.execute(eviction)
            evicted = latest if evicted is None else _merged(evicted, latest)
        raise Unavailable(
            f"models of node {self._context.node} kept coming into use while space was freed for {manifest.repo}; "
            "try again"
        )

    def _admit(self, manifest: Manifest, spaces: list[VolumeSpace], leaves: Mapping[str, int] | None) -> Admission:
        return admit(manifest, self._ledger, self.settings, spaces[0].free_bytes, spaces, leaves)

    async def _admits(self, manifest: Manifest, leaves: Mapping[str, int] | None) -> bool:
        try:
            self._admit(manifest, await self.refresh_free_space(), leaves)
        except QuotaExceeded:
            return False
        return True

    async def wait_space_released(self, suffices: Callable[[], Awaitable[bool]]) -> bool:
        """Wait briefly for the file system to release the space of an executed plan. Returns False if it does not.

        Files that somebody has open keep their space until they are closed: more victims would not help.
        """
        deadline_s = asyncio.get_running_loop().time() + _FREED_DEADLINE_S
        while not await suffices():
            if asyncio.get_running_loop().time() > deadline_s:
                return False
            await asyncio.sleep(_FREED_POLL_S)
        return True

    def _not_released(self, refusal: QuotaExceeded, evicted: EvictionPlan) -> QuotaExceeded:
        return QuotaExceeded(
            f"{refusal.message}; {format_bytes(evicted.freed_bytes)} were evicted for it, but the disk has not "
            "released "
            "them: a process has these files open (`lsof +L1` lists it), or others write to this disk",
            **refusal.details,
            evicted=[v.model for v in evicted.victims],
        )

    async def execute(self, eviction: EvictionPlan) -> EvictionPlan:
        """Carry out a plan, up to a victim that has come into use. Returns what was done; `enough` if all was."""
        garbage_bytes = await self.delete_garbage(eviction.garbage)
        unfinished: list[Victim] = []
        for abandoned in eviction.ended_downloads:
            freed = await self._remove(abandoned.model)
            unfinished.append(structs.replace(abandoned, freed_bytes=freed))
            log.info("abandoned download deleted", model=abandoned.model, freed_bytes=freed)
        done: list[Victim] = []
        for victim in eviction.victims:
            users_by_model = await self._usage.current_users()
            if victim.model in users_by_model:
                log.info(
                    "eviction victim in use; replanning",
                    model=victim.model,
                    users=join_names(users_by_model[victim.model]),
                )
                break
            freed = await self._remove(victim.model)
            done.append(structs.replace(victim, freed_bytes=freed))
            await self._context.events.emit(
                "evicted", model=victim.model, freed_bytes=freed, last_use_s=victim.last_use_s
            )
            log.info("model evicted", model=victim.model, freed_bytes=freed)
        await self._publisher.publish_storage()
        return structs.replace(
            eviction,
            garbage_bytes=garbage_bytes,
            ended_downloads=unfinished,
            victims=done,
            freed_bytes=garbage_bytes + sum(v.freed_bytes for v in (*unfinished, *done)),
            enough=len(done) == len(eviction.victims),
        )

    async def delete_garbage(self, blobs: Iterable[str] | None = None) -> int:
        """Delete these blobs, or all unreferenced ones, and the rest of failed deletions. Returns bytes freed."""
        freed, ledger = 0, self._ledger
        for model in list(ledger.deleting):
            try:
                freed += await self._remove(model)
            except OSError as e:  # tried again later; the others are deleted all the same
                log.warning("cannot delete the rest of a deleted model", model=model, reason=str(e))
        needed, spare = referenced_blobs(ledger), removable_copies(ledger)
        for sha256 in find_garbage(ledger) if blobs is None else blobs:
            for volume_id, size_bytes in spare.get(sha256, {}).items():
                await asyncio.to_thread(delete_copy, self._store, sha256, volume_id)
                log.info("redundant blob copy deleted", blob=sha256, freed_bytes=size_bytes)
                freed += size_bytes
            if sha256 in spare:
                ledger.drop_copies(sha256)
            if sha256 not in needed:
                await asyncio.to_thread(delete_blob, self._store, sha256)
                freed += ledger.drop_blob(sha256)
        return freed


def free_space_by_volume(store: Store, in_flight: Mapping[str, int]) -> list[VolumeSpace]:
    """Return the free space of the store's file system, then of each volume. Blocking.

    Two volumes on one file system, which the settings do not allow, count its bytes once: the second adds nothing.
    """
    spaces = [VolumeSpace("", "the store", store.free_bytes() + store.ballast.held_bytes, in_flight.get("", 0))]
    devices = {store.device: 0}
    for volume in list(store.volumes.values()):
        if not volume.is_mounted():
            continue
        reserved_bytes = in_flight.get(volume.id, 0)
        if (index := devices.setdefault(volume.device, len(spaces))) < len(spaces):
            shared = spaces[index]
            spaces[index] = structs.replace(shared, in_flight_bytes=shared.in_flight_bytes + reserved_bytes)
            continue
        spaces.append(
            VolumeSpace(volume.id, str(volume.path), volume.free_bytes() + volume.ballast.held_bytes, reserved_bytes)
        )
    return spaces


def _merged(first: EvictionPlan, second: EvictionPlan) -> EvictionPlan:
    """Merge two executed plans, in order, for the need of the first."""
    return structs.replace(
        second,
        required_bytes=first.required_bytes,
        garbage=first.garbage + second.garbage,
        garbage_bytes=first.garbage_bytes + second.garbage_bytes,
        ended_downloads=first.ended_downloads + second.ended_downloads,
        victims=first.victims + second.victims,
        freed_bytes=first.freed_bytes + second.freed_bytes,
        evictable_bytes=first.evictable_bytes,
    )
