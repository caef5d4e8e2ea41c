"""Making room: plans made of what is known now, and carried out step by step. Only within the guard's section."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

from msgspec import structs

from shoal_common.errors import QuotaExceeded, Unavailable
from shoal_common.logs import Log
from shoal_common.messages.questions import EvictionPlan, Victim
from shoal_common.messages.records import Manifest
from shoal_common.service import Context
from shoal_storage.announce import Announcer
from shoal_storage.decide import Admission, Ledger, Limits, Wanted, admit, human, referenced, wanted
from shoal_storage.disk import Disk
from shoal_storage.evict import Enough, garbage_of, kept_models, plan, refusal_with, spare_copies
from shoal_storage.spread import Space
from shoal_storage.users import words
from shoal_storage.uses import Uses

log = Log("storage")

_PLANS_AT_MOST = 5
_FREED_DEADLINE_S = 5.0
"""How long a file system may take to give back what was removed."""
_FREED_LOOK_S = 0.1


class Room:
    """Finds out what may go, and makes it go. `remove` takes a model off disk and ledger and returns bytes freed."""

    def __init__(
        self,
        context: Context,
        disk: Disk,
        ledger: Ledger,
        limits: Limits,
        uses: Uses,
        announcer: Announcer,
        remove: Callable[[str], Awaitable[int]],
    ) -> None:
        self._context, self._disk, self._ledger = context, disk, ledger
        self.limits = limits
        self._uses, self._announcer, self._remove = uses, announcer, remove

    async def spaces(self) -> list[Space]:
        """What each file system has and its reserve holds, the store's first. What partials have taken is brought up
        to date before.
        """
        for blob, partial in self._ledger.partials.items():
            await asyncio.to_thread(self._disk.look_at, blob, partial)
        return await asyncio.to_thread(spaces_of, self._disk, self._ledger.in_flight_by_root)

    async def plan_for(self, new_bytes: int) -> EvictionPlan:
        """What would go for so many new bytes to come in, as one blob. Nothing is done."""
        asked, spaces = Wanted({"": new_bytes}, {}, new_bytes), await self.spaces()
        need_bytes = asked.lacking(self._ledger, self.limits, spaces).need_bytes
        return await self.plan_to_free(need_bytes, asked.met_by(self._ledger, self.limits, spaces))

    async def plan_to_free(self, need_bytes: int, enough: Enough, asking: str = "") -> EvictionPlan:
        """What would go to free so many bytes, where `enough` wants them. What is here of the model that asks stays.

        Nothing is done.
        """
        ledger = self._ledger
        kept = kept_models(ledger, await self._uses.now(), asking)
        made = plan(need_bytes, ledger, ledger.last_uses, kept, enough)
        if asking not in ledger.here:
            kept.pop(asking, None)  # nothing to keep yet: a dry run before it asked says the same
        return structs.replace(made, kept=kept)

    async def admit(
        self, manifest: Manifest, leaves: Mapping[str, int] | None = None
    ) -> tuple[Admission, EvictionPlan | None]:
        """Approve a manifest, making room when the policy is to. Returns what went. Raises QuotaExceeded.

        What the manifest needs has to be promised already: else it could go to make room for itself.
        """
        went: EvictionPlan | None = None
        for _ in range(_PLANS_AT_MOST):
            spaces = await self.spaces()
            try:
                return self._admit(manifest, spaces, leaves), went
            except QuotaExceeded as refusal:
                if went is not None and went.enough:
                    if not await self.wait_freed(lambda: self._admits(manifest, leaves)):
                        raise self._not_given_back(refusal, went) from None
                    continue
                enough = wanted(manifest, self._ledger, leaves).met_by(self._ledger, self.limits, spaces)
                made = await self.plan_to_free(refusal.details["shortfall_bytes"], enough, asking=manifest.model)
                if (policy := self.limits.eviction_policy) != "lru" or not made.enough:
                    raise refusal_with(refusal, made, policy) from None
            done = await self.carry_out(made)
            went = done if went is None else _together(went, done)
        raise Unavailable(
            f"models of node {self._context.node} came into use again and again while room was made for "
            f"{manifest.repo}; try again"
        )

    def _admit(self, manifest: Manifest, spaces: list[Space], leaves: Mapping[str, int] | None) -> Admission:
        return admit(manifest, self._ledger, self.limits, spaces[0].free_bytes, spaces, leaves)

    async def _admits(self, manifest: Manifest, leaves: Mapping[str, int] | None) -> bool:
        try:
            self._admit(manifest, await self.spaces(), leaves)
        except QuotaExceeded:
            return False
        return True

    async def wait_freed(self, suffices: Callable[[], Awaitable[bool]]) -> bool:
        """A whole plan was carried out: wait a little for the file system to give it back. False: it has not.

        Files that somebody has open keep their space until they are closed: more victims would be no help.
        """
        give_up_s = asyncio.get_running_loop().time() + _FREED_DEADLINE_S
        while not await suffices():
            if asyncio.get_running_loop().time() > give_up_s:
                return False
            await asyncio.sleep(_FREED_LOOK_S)
        return True

    def _not_given_back(self, refusal: QuotaExceeded, went: EvictionPlan) -> QuotaExceeded:
        return QuotaExceeded(
            f"{refusal.message}; {human(went.frees_bytes)} were evicted for it, and the disk has not given them "
            "back: a process has these files open (`lsof +L1` names it), or others write to this disk",
            **refusal.details,
            evicted=[v.model for v in went.victims],
        )

    async def carry_out(self, made: EvictionPlan) -> EvictionPlan:
        """Do what a plan says, up to a victim that has come into use. Returns what was done; `enough` if all was."""
        garbage_bytes = await self.remove_garbage(made.garbage)
        unfinished: list[Victim] = []
        for left in made.unfinished:
            freed = await self._remove(left.model)
            unfinished.append(structs.replace(left, frees_bytes=freed))
            log.info("removed what an ended download had left", model=left.model, freed_bytes=freed)
        done: list[Victim] = []
        for victim in made.victims:
            uses = await self._uses.now()
            if victim.model in uses:
                log.info("a victim came into use; planning anew", model=victim.model, users=words(uses[victim.model]))
                break
            freed = await self._remove(victim.model)
            done.append(structs.replace(victim, frees_bytes=freed))
            await self._context.events.tell(
                "evicted", model=victim.model, freed_bytes=freed, last_use_s=victim.last_use_s
            )
            log.info("evicted", model=victim.model, freed_bytes=freed)
        await self._announcer.publish()
        return structs.replace(
            made,
            garbage_bytes=garbage_bytes,
            unfinished=unfinished,
            victims=done,
            frees_bytes=garbage_bytes + sum(v.frees_bytes for v in (*unfinished, *done)),
            enough=len(done) == len(made.victims),
        )

    async def remove_garbage(self, blobs: Iterable[str] | None = None) -> int:
        """Remove these blobs, or all that nothing refers to, and what deletes have left. Returns bytes freed."""
        freed, ledger = 0, self._ledger
        for model in list(ledger.leaving):
            try:
                freed += await self._remove(model)
            except OSError as e:  # as before; it does not keep others from going
                log.warning("what is left of a deleted model could not be removed", model=model, why=str(e))
        needed, spare = referenced(ledger), spare_copies(ledger)
        for sha256 in garbage_of(ledger) if blobs is None else blobs:
            for further, size_bytes in spare.get(sha256, {}).items():
                await asyncio.to_thread(self._disk.remove_copy, sha256, further)
                log.info("removed one of two copies of a blob", blob=sha256, freed_bytes=size_bytes)
                freed += size_bytes
            if sha256 in spare:
                del ledger.doubles[sha256]
            if sha256 not in needed:
                await asyncio.to_thread(self._disk.remove_blob, sha256)
                freed += ledger.drop(sha256)
        ledger.git = {git: sha for git, sha in ledger.git.items() if sha in ledger.blobs}
        return freed


def spaces_of(disk: Disk, in_flight: Mapping[str, int]) -> list[Space]:
    """What the store's file system has for blobs, and then each further root's. Blocking.

    Two roots on one file system, which nobody could have asked for, have its bytes once: the second takes nothing.
    """
    found = [Space("", "the store", disk.free_bytes() + disk.reserve.held_bytes, in_flight.get("", 0))]
    devices = {disk.device: 0}
    for root in list(disk.further.values()):
        if not root.is_there():
            continue
        its = in_flight.get(root.id, 0)
        if (first := devices.setdefault(root.device, len(found))) < len(found):
            twin = found[first]
            found[first] = structs.replace(twin, in_flight_bytes=twin.in_flight_bytes + its)
            continue
        found.append(Space(root.id, str(root.path), root.free_bytes() + root.reserve.held_bytes, its))
    return found


def _together(first: EvictionPlan, second: EvictionPlan) -> EvictionPlan:
    """What two plans have done, one after the other, for the need of the first."""
    return structs.replace(
        second,
        need_bytes=first.need_bytes,
        garbage=first.garbage + second.garbage,
        garbage_bytes=first.garbage_bytes + second.garbage_bytes,
        unfinished=first.unfinished + second.unfinished,
        victims=first.victims + second.victims,
        frees_bytes=first.frees_bytes + second.frees_bytes,
        evictable_bytes=first.evictable_bytes,
    )
