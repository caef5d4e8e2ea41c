"""What may go, and in which order, when room is needed (docs/storage.md, "The plan"). Pure.

References are counted once over all models, so a plan costs one look at every file of every model, however many
models there are and however much they share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from msgspec import structs

from shoal_common.errors import QuotaExceeded
from shoal_common.messages.questions import EvictionPlan, Victim
from shoal_storage.decide import EvictionPolicy, Ledger, human
from shoal_storage.users import User, words

_LISTED_AT_MOST = 1000


def plan(need_bytes: int, ledger: Ledger, last_uses: Mapping[str, float], kept: Mapping[str, str]) -> EvictionPlan:
    """How `need_bytes` are freed: all garbage, then the models least lately used that are not in `kept`.

    A model without a last use counts as never used. What a victim frees is what nothing else needs once the
    victims before it are gone.
    """
    needs, references = _needs(ledger)
    blobs = ledger.blobs
    garbage = sorted(b for b in blobs if b not in references)
    garbage_bytes = sum(blobs[b] for b in garbage)
    order = sorted((m for m in ledger.on_disk if m not in kept), key=lambda m: (last_uses.get(m, 0.0), m))

    left, prefix, evictable = references.copy(), list[str](), garbage_bytes
    for model in order:
        if evictable < need_bytes:
            prefix.append(model)
        evictable += _leave(needs[model], left, blobs)
    if need_bytes <= 0 or evictable < need_bytes:
        return EvictionPlan(
            need_bytes=max(need_bytes, 0), enough=need_bytes <= 0, evictable_bytes=evictable, kept=dict(kept)
        )

    left = references.copy()
    freed = garbage_bytes + sum(_leave(needs[model], left, blobs) for model in prefix)
    victims = []
    for model in prefix:
        stays = sum(blobs.get(b, 0) for b in needs[model] if left[b] == 0)
        if freed - stays >= need_bytes:  # the others suffice: it is spared
            freed -= stays
            left.update(needs[model])
        else:
            victims.append(model)

    left = references.copy()
    steps = [
        Victim(model=m, frees_bytes=_leave(needs[m], left, blobs), last_use_s=last_uses.get(m, 0.0)) for m in victims
    ]
    return EvictionPlan(
        need_bytes=need_bytes,
        garbage=garbage,
        garbage_bytes=garbage_bytes,
        victims=steps,
        frees_bytes=garbage_bytes + sum(v.frees_bytes for v in steps),
        enough=True,
        evictable_bytes=evictable,
        kept=dict(kept),
    )


def _needs(ledger: Ledger) -> tuple[dict[str, set[str]], Counter[str]]:
    """The blobs that each model needs, whole, broken, leased or on its way in, and how many models need each blob."""
    needs = {model: {f.blob for f in m.files} for model, m in ledger.on_disk.items()}
    for model, blobs in ledger.promised.items():
        needs.setdefault(model, set()).update(blobs)
    for lease in ledger.leases.values():
        needs.setdefault(lease.model, set()).update(lease.blobs)
    for blob, partial in ledger.partials.items():
        for model in partial.models:
            needs.setdefault(model, set()).add(blob)
    references: Counter[str] = Counter()
    for blobs in needs.values():
        references.update(blobs)
    return needs, references


def _leave(its: Iterable[str], left: Counter[str], blobs: Mapping[str, int]) -> int:
    """Take a model's references away. Returns the bytes that nothing needs any more."""
    freed = 0
    for blob in its:
        left[blob] -= 1
        if left[blob] == 0:
            freed += blobs.get(blob, 0)
    return freed


def garbage_of(ledger: Ledger) -> list[str]:
    """Blobs that no manifest, no fetch under way and no lease needs."""
    _, references = _needs(ledger)
    return sorted(b for b in ledger.blobs if b not in references)


def kept_models(ledger: Ledger, uses: Mapping[str, Sequence[User]]) -> dict[str, str]:
    """The models here, or on their way, that may not go, and why."""
    coming, here = set(ledger.promised) | {m for p in ledger.partials.values() for m in p.models}, ledger.on_disk
    kept = dict.fromkeys(sorted(coming), "being fetched")
    kept |= {model: f"used by {words(users)}" for model, users in sorted(uses.items()) if model in here}
    kept |= dict.fromkeys(sorted(ledger.pinned & here.keys()), "pinned")
    return kept


def refusal_with(refusal: QuotaExceeded, made: EvictionPlan, policy: EvictionPolicy) -> QuotaExceeded:
    """A refusal that also says what could go."""
    if made.enough:
        models = [v.model for v in made.victims]
        what = f"{len(models)} {'model' if len(models) == 1 else 'models'}" if models else "garbage alone"
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
    return structs.replace(made, garbage=made.garbage[:_LISTED_AT_MOST], kept=kept)
