"""Frees space: plans eviction from the current state and carries it out step by step.

The section is given up between the steps, since NATS has to say who uses a model. What protects a victim meanwhile:
each step decides again, by the ledger and the instances of that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from msgspec import structs

from shoal_common.errors import QuotaExceeded, Unavailable
from shoal_common.logs import StructuredLogger
from shoal_common.messages.manifest import Manifest
from shoal_common.messages.storage import EvictionPlan, Victim
from shoal_common.names import ModelId
from shoal_common.units import format_bytes
from shoal_storage.admission.admission import (
    Admission,
    SpaceDemand,
    admit,
    leaves_to_reserve,
    requested_leaves,
    space_demand,
)
from shoal_storage.admission.allocator import VolumeSpace
from shoal_storage.context import StorageContext
from shoal_storage.eviction.model_deleter import ModelDeleter
from shoal_storage.eviction.planner import (
    IsEnough,
    find_garbage,
    plan_eviction,
    protected_models,
    removable_copies,
    with_eviction_hint,
)
from shoal_storage.leases.last_use import UsageView
from shoal_storage.ledger.references import referenced_blobs
from shoal_storage.section import Held
from shoal_storage.store.commit import delete_blob, delete_copy
from shoal_storage.store.partials import refresh_partial
from shoal_storage.store.store import Store

LeafRanges = Mapping[str, Iterable[Sequence[int]]]
log = StructuredLogger("storage")

_MAX_PLANS = 5
_FREED_DEADLINE_S = 5.0
"""How long a file system may take to release the space of deleted files."""
_FREED_POLL_S = 0.1
_GARBAGE_BATCH = 32
"""Blobs deleted in one hold of the section."""


class EvictionExecutor:
    """Plans and carries out evictions."""

    def __init__(self, context: StorageContext, usage: UsageView, deleter: ModelDeleter) -> None:
        self._context, self._store, self._ledger = context, context.store, context.ledger
        self._usage, self._deleter = usage, deleter
        self.turn = asyncio.Lock()
        """Held, outside the section, by whoever admits or releases a model or evicts for one: nobody else is admitted
        into what is being freed.
        """

    async def refresh_free_space(self, held: Held) -> list[VolumeSpace]:
        """Return the free space of each file system, its ballast included, the store's first. Refreshes the partial
        blobs' allocated bytes before.
        """
        held.require()
        for blob in list(self._ledger.arrivals.partials):
            await asyncio.to_thread(refresh_partial, self._store, blob, self._ledger)
        return await asyncio.to_thread(free_space_by_volume, self._store, self._ledger.arrivals.in_flight_by_volume)

    # Plans

    async def plan_for_new_bytes(self, new_bytes: int) -> EvictionPlan:
        """Return what would be evicted for so many new bytes, as one blob. Changes nothing."""
        await self._usage.catch_up()
        async with self._context.section as held:
            demand, spaces = SpaceDemand({"": new_bytes}, {}, new_bytes), await self.refresh_free_space(held)
            ledger, settings = self._ledger, self._context.settings
            need_bytes = demand.shortfall(ledger, settings, spaces).required_bytes
            return await self._plan(held, need_bytes, demand.met_after_freeing(ledger, settings, spaces))

    async def _plan(
        self, held: Held, need_bytes: int, enough: IsEnough, admitted_model: ModelId | None = None
    ) -> EvictionPlan:
        """Return what would be evicted to free so many bytes where `enough` needs them. The admitted model stays.

        Changes nothing.
        """
        ledger = self._ledger
        protected = protected_models(ledger, await self._usage.current_users(held), admitted_model)
        eviction = plan_eviction(need_bytes, ledger, ledger.uses.last_uses, protected, enough)
        if admitted_model is not None and admitted_model not in ledger.local_manifests:
            protected.pop(admitted_model, None)  # nothing to protect yet: a dry run before the request says the same
        return structs.replace(eviction, protected=protected)

    # Evictions for somebody

    async def admit(
        self,
        manifest: Manifest,
        leaf_ranges: LeafRanges,
        reserve: Callable[[Held, Admission, Mapping[str, int]], Awaitable[None]],
    ) -> tuple[Admission, EvictionPlan | None]:
        """Approve a manifest, evicting if the policy allows, and reserve it: `reserve` with the approval and leaves.

        In the caller's turn. Returns what was evicted. Raises QuotaExceeded.
        """
        evicted: EvictionPlan | None = None
        for _ in range(_MAX_PLANS):
            try:
                async with self._context.section as held:
                    leaves = self._leaves(manifest, leaf_ranges)
                    admission = await self._admit(held, manifest, leaves)
                    await reserve(held, admission, leaves)
                    return admission, evicted
            except QuotaExceeded as refusal:
                if evicted is None or not evicted.enough:
                    latest = await self._evict_for(manifest, leaf_ranges, refusal)
                    evicted = _merged(evicted, latest) if evicted and latest else latest or evicted
                elif not await self.wait_space_released(lambda: self._admits(manifest, leaf_ranges)):
                    raise self._not_released(refusal, evicted) from None
        raise Unavailable(
            f"models of node {self._context.node} kept coming into use while space was freed for {manifest.repo}; "
            "try again"
        )

    async def evict(self, find_shortfall: Callable[[Held], Awaitable[Mapping[str, int]]]) -> EvictionPlan | None:
        """Free what is missing on each volume, if one plan can; in the caller's turn. Returns what was done."""
        await self._usage.catch_up()
        async with self._context.section as held:
            lacking_by_volume = await find_shortfall(held)

            def enough(freed: Mapping[str, int]) -> bool:
                return all(
                    freed.get(volume_id, 0) >= lacking_bytes for volume_id, lacking_bytes in lacking_by_volume.items()
                )

            eviction = await self._plan(held, sum(lacking_by_volume.values()), enough)
        return await self._execute(eviction) if lacking_by_volume and eviction.enough else None

    async def _evict_for(
        self, manifest: Manifest, leaf_ranges: LeafRanges, refusal: QuotaExceeded
    ) -> EvictionPlan | None:
        """Evict for a refused manifest. Returns what was done; None if there is space by now. Raises the refusal."""
        ledger, settings = self._ledger, self._context.settings
        await self._usage.catch_up()
        async with self._context.section as held:
            demand, spaces = self._demand(manifest, leaf_ranges), await self.refresh_free_space(held)
            need_bytes = demand.shortfall(ledger, settings, spaces).required_bytes
            if not need_bytes:
                return None
            enough = demand.met_after_freeing(ledger, settings, spaces)
            with ledger.arrivals.counted_as_reserved(manifest):
                eviction = await self._plan(held, need_bytes, enough, manifest.model)
        if settings.eviction_policy != "lru" or not eviction.enough:
            raise with_eviction_hint(refusal, eviction, settings.eviction_policy) from None
        return await self._execute(eviction, manifest)

    def _leaves(self, manifest: Manifest, leaf_ranges: LeafRanges) -> dict[str, int]:
        return leaves_to_reserve(manifest.model, requested_leaves(manifest, leaf_ranges, self._ledger), self._ledger)

    def _demand(self, manifest: Manifest, leaf_ranges: LeafRanges) -> SpaceDemand:
        return space_demand(manifest, self._ledger, self._leaves(manifest, leaf_ranges))

    async def _admit(self, held: Held, manifest: Manifest, leaves: Mapping[str, int]) -> Admission:
        spaces = await self.refresh_free_space(held)
        return admit(manifest, self._ledger, self._context.settings, spaces[0].free_bytes, spaces, leaves)

    async def _admits(self, manifest: Manifest, leaf_ranges: LeafRanges) -> bool:
        async with self._context.section as held:
            try:
                await self._admit(held, manifest, self._leaves(manifest, leaf_ranges))
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

    # Steps

    async def _execute(self, eviction: EvictionPlan, admitted: Manifest | None = None) -> EvictionPlan:
        """Carry out a plan, up to a victim that may not go any more. Returns what was done; `enough` if all was."""
        garbage_bytes = await self.delete_garbage(eviction.garbage, admitted)
        unfinished, done = list[Victim](), list[Victim]()
        for victim in (*eviction.ended_downloads, *eviction.victims):
            await self._usage.catch_up()
            async with self._context.section as held:
                with self._ledger.arrivals.counted_as_reserved(admitted):
                    if reason := await self._reason_to_keep(held, victim, eviction, admitted):
                        log.info("eviction victim may not go any more; replanning", model=victim.model, reason=reason)
                        break
                    was_here = victim.model in self._ledger.local_manifests
                    freed = await self._deleter.delete_model(held, victim.model)
            if victim in eviction.ended_downloads:
                unfinished.append(structs.replace(victim, freed_bytes=freed))
                log.info("abandoned download deleted", model=victim.model, freed_bytes=freed)
                continue
            done.append(structs.replace(victim, freed_bytes=freed))
            if was_here:
                await self._context.events.emit(
                    "evicted", model=victim.model, freed_bytes=freed, last_use_s=victim.last_use_s
                )
                log.info("model evicted", model=victim.model, freed_bytes=freed)
        return structs.replace(
            eviction,
            garbage_bytes=garbage_bytes,
            ended_downloads=unfinished,
            victims=done,
            freed_bytes=garbage_bytes + sum(v.freed_bytes for v in (*unfinished, *done)),
            enough=len(unfinished) + len(done) == len(eviction.ended_downloads) + len(eviction.victims),
        )

    async def _reason_to_keep(
        self, held: Held, victim: Victim, eviction: EvictionPlan, admitted: Manifest | None
    ) -> str:
        """Return what has come between a plan and its victim, or ""."""
        ledger = self._ledger
        protected = protected_models(
            ledger, await self._usage.current_users(held), admitted.model if admitted else None
        )
        if victim in eviction.ended_downloads and victim.model not in ledger.arrivals.ended_reservations:
            return "its download goes on, or is complete"
        return protected.get(victim.model, "")

    async def delete_garbage(self, blobs: Iterable[str], admitted: Manifest | None = None) -> int:
        """Delete those of these blobs that nothing needs, and the rest of failed deletions. Returns bytes freed."""
        freed, ledger, pending = 0, self._ledger, list(blobs)
        for model in list(ledger.deleting):
            async with self._context.section as held:
                with ledger.arrivals.counted_as_reserved(admitted):
                    try:
                        freed += await self._deleter.delete_model(held, model) if model in ledger.deleting else 0
                    except OSError as e:  # tried again later; the others are deleted all the same
                        log.warning("cannot delete the rest of a deleted model", model=model, reason=str(e))
        for start in range(0, len(pending), _GARBAGE_BATCH):
            async with self._context.section as held:
                with ledger.arrivals.counted_as_reserved(admitted):
                    freed += await self._delete_unneeded(held, pending[start : start + _GARBAGE_BATCH])
        return freed

    async def _delete_unneeded(self, held: Held, blobs: Iterable[str]) -> int:
        held.require()
        freed, ledger = 0, self._ledger
        needed, spare = referenced_blobs(ledger), removable_copies(ledger)
        for sha256 in blobs:
            for volume_id, size_bytes in spare.get(sha256, {}).items():
                await asyncio.to_thread(delete_copy, self._store, sha256, volume_id)
                log.info("redundant blob copy deleted", blob=sha256, freed_bytes=size_bytes)
                freed += size_bytes
            if sha256 in spare:
                ledger.drop_copies(sha256)
            if sha256 in ledger.blobs and sha256 not in needed:
                await asyncio.to_thread(delete_blob, self._store, sha256)
                freed += ledger.drop_blob(sha256)
        return freed

    async def collect_garbage(self) -> tuple[int, int]:
        """Delete everything that nothing needs. Returns the bytes freed and the number of blobs."""
        async with self._context.section as held:
            held.require()
            garbage = find_garbage(self._ledger)
        return await self.delete_garbage(garbage), len(garbage)


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
