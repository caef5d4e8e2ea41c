"""The eviction plan: what may go, and in which order, when space is needed (docs/storage.md, "The plan"). Pure.

References are counted once over all models, so a plan costs one pass over the files of all models, however many
models there are and however much they share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import copy

from msgspec import structs

from shoal_common.errors import QuotaExceeded
from shoal_common.messages.storage import EvictionPlan, Victim
from shoal_common.names import ModelId
from shoal_common.settings.node import EvictionPolicy
from shoal_common.units import format_bytes
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.usage import ModelUser, join_names

_MAX_LISTED = 1000


IsEnough = Callable[[Mapping[str, int]], bool]
"""Whether so many bytes freed, by volume ("" for the store), are enough."""


def plan_eviction(
    need_bytes: int,
    ledger: Ledger,
    last_uses: Mapping[ModelId, float],
    protected: Mapping[ModelId, str],
    enough: IsEnough | None = None,
) -> EvictionPlan:
    """Plan how to free `need_bytes`: all garbage, then abandoned downloads, then the least recently used models that
    are not in `protected`.

    Where there are volumes, `enough` says whether the bytes freed on each suffice. A model without a last use counts
    as never used. A victim frees what nothing else needs once the victims before it are gone.
    """
    is_enough = enough or (lambda freed: sum(freed.values()) >= need_bytes)
    needs = _needs(ledger)
    start, needed = _References(ledger, needs), set[str]().union(*needs.values())
    garbage = _garbage(ledger, needed)
    freed = _garbage_bytes(garbage, ledger, needed)
    garbage_bytes = freed.total()
    local = ledger.local_manifests
    abandoned = [m for m in ledger.arrivals.ended_reservations if m not in local and m not in protected]
    abandoned.sort(key=lambda m: (ledger.arrivals.last_wanted_s.get(m, 0.0), m))
    order = sorted((m for m in local if m not in protected), key=lambda m: (last_uses.get(m, 0.0), m))
    evictable_bytes = garbage_bytes + start.only_in({*abandoned, *order})

    remaining, prefix = start.copy(), list[ModelId]()
    suffices = need_bytes <= 0 or is_enough(freed)
    for model in (*abandoned, *order):
        if suffices:
            break
        prefix.append(model)
        for volume_id, size_bytes in remaining.remove(model).items():
            freed[volume_id] += size_bytes
        suffices = is_enough(freed)
    if need_bytes <= 0 or not suffices:
        return EvictionPlan(
            required_bytes=max(need_bytes, 0),
            enough=need_bytes <= 0,
            evictable_bytes=evictable_bytes,
            protected=dict(protected),
        )

    models = [m for m in prefix if m in local]
    spared = set[ModelId]()
    # An abandoned download is never kept at the cost of a model.
    for model in models or prefix:
        still_needed = remaining.needed_by(model)
        remaining_freed = {
            volume_id: size_bytes - still_needed.get(volume_id, 0) for volume_id, size_bytes in freed.items()
        }
        if is_enough(remaining_freed):  # the others suffice: spare this one
            freed = Counter(remaining_freed)
            remaining.restore(model)
            spared.add(model)

    unfinished = [
        Victim(
            model=m, freed_bytes=sum(start.remove(m).values()), last_use_s=ledger.arrivals.last_wanted_s.get(m, 0.0)
        )
        for m in prefix
        if m not in local and m not in spared
    ]
    victims = [
        Victim(model=m, freed_bytes=sum(start.remove(m).values()), last_use_s=last_uses.get(m, 0.0))
        for m in models
        if m not in spared
    ]
    return EvictionPlan(
        required_bytes=need_bytes,
        garbage=garbage,
        garbage_bytes=garbage_bytes,
        ended_downloads=unfinished,
        victims=victims,
        freed_bytes=garbage_bytes + sum(v.freed_bytes for v in (*unfinished, *victims)),
        enough=True,
        evictable_bytes=evictable_bytes,
        protected=dict(protected),
    )


class _References:
    """References to blobs, while models are removed one by one. A blob is freed when no model needs it; a partial
    blob, with the bytes it occupies, when no model is left that it arrives for.
    """

    def __init__(self, ledger: Ledger, needs: Mapping[ModelId, set[str]]) -> None:
        self._sizes, self._volume_by_blob, self._needs = ledger.blobs, ledger.volume_by_blob, needs
        self._partials: dict[str, list[str]] = {}
        leaving = ledger.arrivals.ended_reservations | ledger.shards.keys()
        self._occupied = {
            b: min(p.allocated_bytes, ledger.arrivals.reserved_bytes_of(p))
            for b, p in ledger.arrivals.partials.items()
            if p.models and p.models <= leaving
        }
        self._blobs, self._arriving = Counter[str](), Counter[str]()
        self._freed = set[str]()
        for blobs in needs.values():
            self._blobs.update(blobs)
        for blob in self._occupied:
            for model in ledger.arrivals.partials[blob].models:
                self._partials.setdefault(model, []).append(blob)
                self._arriving[blob] += 1

    def copy(self) -> _References:
        """Return an independent copy."""
        duplicate = copy(self)
        duplicate._blobs, duplicate._arriving, duplicate._freed = (
            self._blobs.copy(),
            self._arriving.copy(),
            self._freed.copy(),
        )
        return duplicate

    def only_in(self, models: Set[ModelId]) -> int:
        """Return the bytes that nothing would need if all of these models were removed."""
        needed = set[str]().union(*(blobs for m, blobs in self._needs.items() if m not in models))
        arriving = {b for m, blobs in self._partials.items() if m not in models for b in blobs}
        freed_bytes = sum(self._sizes[b] for b in self._blobs.keys() - needed if b in self._sizes)
        return freed_bytes + sum(n for b, n in self._occupied.items() if b not in arriving)

    def remove(self, model: ModelId) -> dict[str, int]:
        """Remove a model's references. Returns the bytes that nothing needs any more, by volume."""
        # Inlined: this and `needed_by` are most of what a plan costs.
        freed, counts, arriving = dict[str, int](), self._blobs, self._arriving
        for b in self._needs[model]:
            counts[b] = count = counts[b] - 1
            if count == 0 and b in self._sizes:
                self._freed.add(b)
                volume_id = self._volume_by_blob.get(b, "")
                freed[volume_id] = freed.get(volume_id, 0) + self._sizes[b]
        for b in self._partials.get(model, ()):
            arriving[b] -= 1
            if arriving[b] == 0:
                volume_id = self._volume_by_blob.get(b, "")
                freed[volume_id] = freed.get(volume_id, 0) + self._occupied[b]
        return freed

    def needed_by(self, model: ModelId) -> dict[str, int]:
        """Return the bytes that are unneeded now and that a removed model would need again, by volume."""
        needed = dict[str, int]()
        for b in self._needs[model] & self._freed:
            volume_id = self._volume_by_blob.get(b, "")
            needed[volume_id] = needed.get(volume_id, 0) + self._sizes[b]
        for b in self._partials.get(model, ()):
            if self._arriving[b] == 0:
                volume_id = self._volume_by_blob.get(b, "")
                needed[volume_id] = needed.get(volume_id, 0) + self._occupied[b]
        return needed

    def restore(self, model: ModelId) -> None:
        """Undo `remove`."""
        self._blobs.update(self._needs[model])
        self._freed -= self._needs[model]
        self._arriving.update(self._partials.get(model, ()))


def _needs(ledger: Ledger) -> dict[ModelId, set[str]]:
    """Return the blobs that each model needs: complete, incomplete, leased or arriving."""
    needs = {model: {f.blob for f in m.files} for model, m in ledger.stored_manifests.items()}
    for model, blobs in ledger.arrivals.reservations.items():
        needs.setdefault(model, set()).update(blobs)
    for lease in ledger.uses.leases.values():
        needs.setdefault(lease.model, set()).update(lease.blobs)
    for blob, partial in ledger.arrivals.partials.items():
        for model in partial.models:
            needs.setdefault(model, set()).add(blob)
    return needs


def find_garbage(ledger: Ledger) -> list[str]:
    """Return the blobs that no manifest, running fetch or lease needs, and those with redundant copies."""
    return _garbage(ledger, set[str]().union(*_needs(ledger).values()))


def _garbage(ledger: Ledger, needed: Set[str]) -> list[str]:
    return sorted(ledger.blobs.keys() - needed | removable_copies(ledger).keys())


def removable_copies(ledger: Ledger) -> dict[str, Mapping[str, int]]:
    """Return the redundant copies of blobs: bytes by volume. Copies that a lease's view may link to are excluded."""
    leased = {b for lease in ledger.uses.leases.values() for b in lease.blobs}
    return {b: copies for b, copies in ledger.redundant_copies.items() if b not in leased}


def garbage_bytes_of(garbage: Iterable[str], ledger: Ledger) -> Counter[str]:
    """Return the bytes that deleting these frees, by volume. Of a blob that is needed, only its spare copies go."""
    return _garbage_bytes(garbage, ledger, set[str]().union(*_needs(ledger).values()))


def _garbage_bytes(garbage: Iterable[str], ledger: Ledger, needed: Set[str]) -> Counter[str]:
    spare, freed = removable_copies(ledger), Counter[str]()
    for b in garbage:
        freed.update(spare.get(b, {}))
        if b not in needed:
            freed[ledger.volume_by_blob.get(b, "")] += ledger.blobs.get(b, 0)
    return freed


def protected_models(
    ledger: Ledger, users_by_model: Mapping[ModelId, Sequence[ModelUser]], admitted_model: ModelId | None = None
) -> dict[ModelId, str]:
    """Return the models that may not go, and why. A model that is being admitted counts as being fetched again."""
    arriving, local = (
        set(ledger.arrivals.reservations) | {m for p in ledger.arrivals.partials.values() for m in p.models},
        ledger.local_manifests,
    )
    settled_shards = {m for m in ledger.shards if ledger.is_shard_settled(m)}
    protected = dict.fromkeys(
        sorted(arriving - ((ledger.arrivals.ended_reservations | settled_shards) - {admitted_model})), "being fetched"
    )
    protected |= {
        model: f"used by {join_names(users)}" for model, users in sorted(users_by_model.items()) if model in local
    }
    protected |= dict.fromkeys(sorted(ledger.uses.pinned & local.keys()), "pinned")
    return protected


def with_eviction_hint(refusal: QuotaExceeded, eviction: EvictionPlan, policy: EvictionPolicy) -> QuotaExceeded:
    """Return the refusal, extended by what could be evicted."""
    if eviction.enough:
        models = [v.model for v in eviction.victims]
        victims = f"{len(models)} {'model' if len(models) == 1 else 'models'}" if models else "unreferenced data"
        hint = f"evicting {victims} would free {format_bytes(eviction.freed_bytes)}"
        hint += ": set eviction_policy to lru with `shoal storage set`" if policy == "manual" else ""
    else:
        models = []
        hint = f"{format_bytes(eviction.evictable_bytes)} evictable, {format_bytes(eviction.required_bytes)} needed"
        if protected := [m for m, reason in eviction.protected.items() if reason != "being fetched"]:
            hint += f"; {len(protected)} {'model is' if len(protected) == 1 else 'models are'} pinned or in use"
    figures = {
        "evictable_bytes": eviction.evictable_bytes,
        "eviction_policy": policy,
        "would_evict": models[:_MAX_LISTED],
        "would_free_bytes": eviction.freed_bytes,
    }
    return QuotaExceeded(f"{refusal.message}; {hint}", **{**refusal.details, **figures})


def to_message(eviction: EvictionPlan) -> EvictionPlan:
    """Return a plan that fits a message: very long lists are cut, the figures stay exact."""
    protected = dict(list(eviction.protected.items())[:_MAX_LISTED])
    unfinished = eviction.ended_downloads[:_MAX_LISTED]
    return structs.replace(
        eviction, garbage=eviction.garbage[:_MAX_LISTED], ended_downloads=unfinished, protected=protected
    )
