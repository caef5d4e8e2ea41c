"""What may go, and in which order, when room is needed (docs/storage.md, "The plan"). Pure.

References are counted once over all models, so a plan costs one look at every file of every model, however many
models there are and however much they share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from copy import copy

from msgspec import structs

from shoal_common.errors import QuotaExceeded
from shoal_common.messages.questions import EvictionPlan, Victim
from shoal_storage.decide import EvictionPolicy, Ledger, human
from shoal_storage.users import User, words

_LISTED_AT_MOST = 1000


Enough = Callable[[Mapping[str, int]], bool]
"""Whether so many bytes freed, by further root ("" for the store), are enough."""


def plan(
    need_bytes: int,
    ledger: Ledger,
    last_uses: Mapping[str, float],
    kept: Mapping[str, str],
    enough: Enough | None = None,
) -> EvictionPlan:
    """How `need_bytes` are freed: all garbage, then what ended downloads have left, then the models least lately used
    that are not in `kept`.

    Where there are further roots, `enough` says of what would be freed on each whether that will do. A model without
    a last use counts as never used. What a victim frees is what nothing else needs once those before it are gone.
    """
    will_do = enough or (lambda freed: sum(freed.values()) >= need_bytes)
    needs = _needs(ledger)
    start, needed = _References(ledger, needs), set[str]().union(*needs.values())
    garbage = _garbage(ledger, needed)
    freed = _garbage_bytes(garbage, ledger, needed)
    garbage_bytes = freed.total()
    here = ledger.here
    left_over = [m for m in ledger.ended if m not in here and m not in kept]
    left_over.sort(key=lambda m: (ledger.wanted_s.get(m, 0.0), m))
    order = sorted((m for m in here if m not in kept), key=lambda m: (last_uses.get(m, 0.0), m))
    evictable_bytes = garbage_bytes + start.only_in({*left_over, *order})

    left, prefix = start.copy(), list[str]()
    suffices = need_bytes <= 0 or will_do(freed)
    for model in (*left_over, *order):
        if suffices:
            break
        prefix.append(model)
        for root, size_bytes in left.leave(model).items():
            freed[root] += size_bytes
        suffices = will_do(freed)
    if need_bytes <= 0 or not suffices:
        return EvictionPlan(
            need_bytes=max(need_bytes, 0), enough=need_bytes <= 0, evictable_bytes=evictable_bytes, kept=dict(kept)
        )

    models = [m for m in prefix if m in here]
    spared = set()
    # What ended downloads have left is never kept at the cost of a model.
    for model in models or prefix:
        stays = left.kept_by(model)
        less = {root: size_bytes - stays.get(root, 0) for root, size_bytes in freed.items()}
        if will_do(less):  # the others suffice: it is spared
            freed = Counter(less)
            left.come_back(model)
            spared.add(model)

    unfinished = [
        Victim(model=m, frees_bytes=sum(start.leave(m).values()), last_use_s=ledger.wanted_s.get(m, 0.0))
        for m in prefix
        if m not in here and m not in spared
    ]
    victims = [
        Victim(model=m, frees_bytes=sum(start.leave(m).values()), last_use_s=last_uses.get(m, 0.0))
        for m in models
        if m not in spared
    ]
    return EvictionPlan(
        need_bytes=need_bytes,
        garbage=garbage,
        garbage_bytes=garbage_bytes,
        unfinished=unfinished,
        victims=victims,
        frees_bytes=garbage_bytes + sum(v.frees_bytes for v in (*unfinished, *victims)),
        enough=True,
        evictable_bytes=evictable_bytes,
        kept=dict(kept),
    )


class _References:
    """Who needs what, while one model after the other leaves. A blob goes when no model needs it; a partial, with the
    bytes that it occupies, when no model is left that it arrives for.
    """

    def __init__(self, ledger: Ledger, needs: Mapping[str, set[str]]) -> None:
        self._sizes, self._where, self._needs = ledger.blobs, ledger.where, needs
        self._partials: dict[str, list[str]] = {}
        leaving = ledger.ended | ledger.parts.keys()
        self._occupied = {
            b: min(p.allocated_bytes, ledger.promised_bytes(p))
            for b, p in ledger.partials.items()
            if p.models and p.models <= leaving
        }
        self._blobs, self._arriving = Counter[str](), Counter[str]()
        self._gone = set[str]()
        for blobs in needs.values():
            self._blobs.update(blobs)
        for blob in self._occupied:
            for model in ledger.partials[blob].models:
                self._partials.setdefault(model, []).append(blob)
                self._arriving[blob] += 1

    def copy(self) -> _References:
        """The same, to be changed by itself."""
        made = copy(self)
        made._blobs, made._arriving, made._gone = self._blobs.copy(), self._arriving.copy(), self._gone.copy()
        return made

    def only_in(self, models: Set[str]) -> int:
        """Bytes that nothing would need any more if all of these left."""
        needed = set[str]().union(*(blobs for m, blobs in self._needs.items() if m not in models))
        arriving = {b for m, blobs in self._partials.items() if m not in models for b in blobs}
        gone = sum(self._sizes[b] for b in self._blobs.keys() - needed if b in self._sizes)
        return gone + sum(n for b, n in self._occupied.items() if b not in arriving)

    def leave(self, model: str) -> dict[str, int]:
        """Take a model's references away. Returns the bytes that nothing needs any more, by root."""
        # Written out: this and `kept_by` are most of what a plan costs.
        freed, counts, arriving = dict[str, int](), self._blobs, self._arriving
        for b in self._needs[model]:
            counts[b] = count = counts[b] - 1
            if count == 0 and b in self._sizes:
                self._gone.add(b)
                root = self._where.get(b, "")
                freed[root] = freed.get(root, 0) + self._sizes[b]
        for b in self._partials.get(model, ()):
            arriving[b] -= 1
            if arriving[b] == 0:
                root = self._where.get(b, "")
                freed[root] = freed.get(root, 0) + self._occupied[b]
        return freed

    def kept_by(self, model: str) -> dict[str, int]:
        """Of what nothing needs now, the bytes that a model which has left would need again."""
        found = dict[str, int]()
        for b in self._needs[model] & self._gone:
            root = self._where.get(b, "")
            found[root] = found.get(root, 0) + self._sizes[b]
        for b in self._partials.get(model, ()):
            if self._arriving[b] == 0:
                root = self._where.get(b, "")
                found[root] = found.get(root, 0) + self._occupied[b]
        return found

    def come_back(self, model: str) -> None:
        """Undo `leave`."""
        self._blobs.update(self._needs[model])
        self._gone -= self._needs[model]
        self._arriving.update(self._partials.get(model, ()))


def _needs(ledger: Ledger) -> dict[str, set[str]]:
    """The blobs that each model needs, whole, broken, leased or on its way in."""
    needs = {model: {f.blob for f in m.files} for model, m in ledger.on_disk.items()}
    for model, blobs in ledger.promised.items():
        needs.setdefault(model, set()).update(blobs)
    for lease in ledger.leases.values():
        needs.setdefault(lease.model, set()).update(lease.blobs)
    for blob, partial in ledger.partials.items():
        for model in partial.models:
            needs.setdefault(model, set()).add(blob)
    return needs


def garbage_of(ledger: Ledger) -> list[str]:
    """Blobs that no manifest, no fetch under way and no lease needs, and those that are here once too often."""
    return _garbage(ledger, set[str]().union(*_needs(ledger).values()))


def _garbage(ledger: Ledger, needed: Set[str]) -> list[str]:
    return sorted(ledger.blobs.keys() - needed | spare_copies(ledger).keys())


def spare_copies(ledger: Ledger) -> dict[str, dict[str, int]]:
    """Copies of blobs that are one too many: bytes by root. Those that the view of a lease may lead to are not."""
    leased = {b for lease in ledger.leases.values() for b in lease.blobs}
    return {b: copies for b, copies in ledger.doubles.items() if b not in leased}


def garbage_bytes_of(garbage: Iterable[str], ledger: Ledger) -> Counter[str]:
    """What removing these frees, by root. Of a blob that something needs, only its spare copies go."""
    return _garbage_bytes(garbage, ledger, set[str]().union(*_needs(ledger).values()))


def _garbage_bytes(garbage: Iterable[str], ledger: Ledger, needed: Set[str]) -> Counter[str]:
    spare, found = spare_copies(ledger), Counter[str]()
    for b in garbage:
        found.update(spare.get(b, {}))
        if b not in needed:
            found[ledger.where.get(b, "")] += ledger.blobs.get(b, 0)
    return found


def kept_models(ledger: Ledger, uses: Mapping[str, Sequence[User]], asking: str = "") -> dict[str, str]:
    """The models here, or on their way, that may not go, and why. One that asks to come in is on its way again."""
    coming, here = set(ledger.promised) | {m for p in ledger.partials.values() for m in p.models}, ledger.here
    resting = {m for m in ledger.parts if ledger.at_rest(m)}
    kept = dict.fromkeys(sorted(coming - ((ledger.ended | resting) - {asking})), "being fetched")
    kept |= {model: f"used by {words(users)}" for model, users in sorted(uses.items()) if model in here}
    kept |= dict.fromkeys(sorted(ledger.pinned & here.keys()), "pinned")
    return kept


def refusal_with(refusal: QuotaExceeded, made: EvictionPlan, policy: EvictionPolicy) -> QuotaExceeded:
    """A refusal that also says what could go."""
    if made.enough:
        models = [v.model for v in made.victims]
        what = f"{len(models)} {'model' if len(models) == 1 else 'models'}" if models else "what no model needs"
        hint = f"evicting {what} would free {human(made.frees_bytes)}"
        hint += ": set eviction_policy to lru with `shoal storage set`" if policy == "manual" else ""
    else:
        models = []
        hint = f"{human(made.evictable_bytes)} could be evicted, and {human(made.need_bytes)} would have to be"
        if stay := [m for m, why in made.kept.items() if why != "being fetched"]:
            hint += f"; {len(stay)} {'model is' if len(stay) == 1 else 'models are'} pinned or in use"
    figures = {
        "evictable_bytes": made.evictable_bytes,
        "eviction_policy": policy,
        "would_evict": models[:_LISTED_AT_MOST],
        "would_free_bytes": made.frees_bytes,
    }
    return QuotaExceeded(f"{refusal.message}; {hint}", **{**refusal.details, **figures})


def as_told(made: EvictionPlan) -> EvictionPlan:
    """A plan that fits a message: very long lists are cut, the figures stay whole."""
    kept = dict(list(made.kept.items())[:_LISTED_AT_MOST])
    unfinished = made.unfinished[:_LISTED_AT_MOST]
    return structs.replace(made, garbage=made.garbage[:_LISTED_AT_MOST], unfinished=unfinished, kept=kept)
