"""Eviction plans: nothing protected, never more than needed, and exactly the bytes announced."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shoal_common.errors import QuotaExceeded
from shoal_common.messages import decode, encode
from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.storage import EvictionPlan
from shoal_common.names import ModelId, commit_of, model_id, repo_of
from shoal_common.settings.node import StorageSettings
from shoal_storage.admission.admission import Shortfall, SpaceDemand, admit, store_space
from shoal_storage.eviction.planner import (
    find_garbage,
    plan_eviction,
    protected_models,
    to_message,
    with_eviction_hint,
)
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import blobs_freed_by, referenced_blobs
from shoal_storage.ledger.usage import ModelUser, users_of
from tests.storage.ledger_builder import build_ledger

SIZES = {f"{n:064x}": size for n, size in enumerate([0, 1, 2, 5, 10, 30, 64, 100])}
NAMES = [model_id(f"org/model-{n}", "c" * 40) for n in range(5)]


def manifest_of(model: ModelId, blobs: Iterable[str], sizes: dict[str, int]) -> Manifest:
    files = [ManifestFile(path=f"file-{n}", size_bytes=sizes[b], sha256=b) for n, b in enumerate(blobs)]
    return Manifest(repo=repo_of(model), commit=commit_of(model), files=files)


def ledger_of(models: dict[ModelId, set[str]], blobs: dict[str, int]) -> Ledger:
    """A ledger with these blobs; models that lack one are incomplete."""
    return build_ledger(
        blobs, manifests=[manifest_of(model, sorted(own), SIZES | blobs) for model, own in models.items()]
    )


BLOB_SETS = st.sets(st.sampled_from(sorted(SIZES)), min_size=1, max_size=4)
LEDGERS = st.builds(
    ledger_of,
    st.dictionaries(st.sampled_from(NAMES), BLOB_SETS),
    st.sets(st.sampled_from(sorted(SIZES))).map(lambda b: {x: SIZES[x] for x in sorted(b)}),
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Ledger, dict[ModelId, str], int]:
    """A ledger with pins, uses and downloads; what is protected, and a need."""
    ledger = draw(LEDGERS)
    for model in ledger.stored_manifests:
        ledger.uses.record_use(model, float(draw(st.integers(0, 3))))
    for model in draw(st.sets(st.sampled_from(NAMES), max_size=2)):
        ledger.uses.pin(model)
    if draw(st.booleans()):
        counted_on: set[str] = draw(BLOB_SETS)
        ledger.arrivals.reserve(draw(st.sampled_from(NAMES)), counted_on)
    arriving = [b for b in sorted(SIZES) if b not in ledger.blobs]
    if bool(arriving) and draw(st.booleans()):
        blob = draw(st.sampled_from(arriving))
        ledger.arrivals.reserve_blob(blob, SIZES[blob], draw(st.sampled_from(NAMES)))
    uses = {draw(st.sampled_from(NAMES)): [ModelUser("instance i-1", "i-1")]} if draw(st.booleans()) else {}
    return ledger, protected_models(ledger, uses), draw(st.integers(-1, 250))


def freed_without(ledger: Ledger, leaving: Iterable[str]) -> int:
    """Bytes that nothing needs once these models are gone, computed from scratch."""
    return sum(ledger.blobs[b] for b in ledger.blobs.keys() - referenced_blobs(ledger, leaving))


def carry_out(made: EvictionPlan, ledger: Ledger) -> list[int]:
    """Apply a plan to the ledger, one model at a time, as the service does. Returns what each step freed."""
    freed = [sum(ledger.drop_blob(b) for b in made.garbage)]
    for victim in made.victims:
        leaving = [b for b in blobs_freed_by(victim.model, ledger) if b in ledger.blobs]
        ledger.drop_manifest(victim.model)
        freed.append(sum(ledger.drop_blob(b) for b in leaving))
    return freed


@given(situations())
def test_I4_a_plan_never_names_protected_or_needed_models(case: tuple[Ledger, dict[ModelId, str], int]) -> None:
    ledger, kept, need = case
    made = plan_eviction(need, ledger, ledger.uses.last_uses, kept)
    victims = {v.model for v in made.victims}
    assert not victims & kept.keys() and made.protected == kept
    assert not victims & (ledger.uses.pinned | ledger.arrivals.reservations.keys())
    needed = {
        b for model in kept if model in ledger.stored_manifests for b in ledger.stored_manifests[model].blob_sizes
    }
    needed |= {b for blobs in ledger.arrivals.reservations.values() for b in blobs}
    present = needed & ledger.blobs.keys()
    carry_out(made, ledger)
    assert present <= ledger.blobs.keys(), "bytes that are needed went"


@given(situations())
def test_a_plan_frees_exactly_what_it_claims_step_by_step(case: tuple[Ledger, dict[ModelId, str], int]) -> None:
    ledger, kept, need = case
    made = plan_eviction(need, ledger, ledger.uses.last_uses, kept)
    before = ledger.used_bytes
    assert carry_out(made, ledger) == [made.garbage_bytes, *(v.freed_bytes for v in made.victims)]
    assert before - ledger.used_bytes == made.freed_bytes


@given(situations())
def test_a_plan_is_enough_exactly_when_all_that_may_go_is(case: tuple[Ledger, dict[ModelId, str], int]) -> None:
    ledger, kept, need = case
    made = plan_eviction(need, ledger, ledger.uses.last_uses, kept)
    assert made.evictable_bytes == freed_without(ledger, [m for m in ledger.stored_manifests if m not in kept])
    assert made.enough == (need <= made.evictable_bytes or need <= 0)
    if made.enough and need > 0:
        assert made.freed_bytes >= need
    else:
        assert not made.victims and not made.garbage and made.freed_bytes == 0, "all or nothing"


@given(situations())
def test_no_victim_of_a_plan_could_have_been_spared(case: tuple[Ledger, dict[ModelId, str], int]) -> None:
    ledger, kept, need = case
    victims = [v.model for v in plan_eviction(need, ledger, ledger.uses.last_uses, kept).victims]
    for spared in range(len(victims)):
        for fewer in itertools.combinations(victims, spared):
            assert freed_without(ledger, fewer) < need, f"{fewer} of {victims} would have done"


@given(situations())
def test_victims_are_those_that_the_rule_in_the_document_names(case: tuple[Ledger, dict[ModelId, str], int]) -> None:
    ledger, kept, need = case
    order = sorted((m for m in ledger.stored_manifests if m not in kept), key=lambda m: (ledger.uses.last_uses[m], m))
    expected: list[ModelId] = []
    if 0 < need <= freed_without(ledger, order):
        for model in order:
            if freed_without(ledger, expected) < need:
                expected.append(model)
        for model in list(expected):
            rest = [m for m in expected if m != model]
            if freed_without(ledger, rest) >= need:
                expected = rest
    assert [v.model for v in plan_eviction(need, ledger, ledger.uses.last_uses, kept).victims] == expected


@given(LEDGERS, st.none() | st.integers(0, 300), st.integers(0, 50), st.integers(0, 300), BLOB_SETS)
@example(Ledger(), 0, 0, 0, {f"{7:064x}"})
def test_I3_what_is_lacking_is_what_admission_lacks(
    ledger: Ledger, quota: int | None, headroom: int, free: int, wanted: set[str]
) -> None:
    limits = StorageSettings(quota, headroom)
    manifest = manifest_of(model_id("org/new", "d" * 40), sorted(wanted), SIZES)
    new = sum(SIZES[b] for b in wanted - ledger.blobs.keys())
    lacking = lacking_for(new, ledger, limits, free).required_bytes
    try:
        admit(manifest, ledger, limits, free)
        assert lacking == 0
    except QuotaExceeded as refused:
        assert refused.details["shortfall_bytes"] == lacking > 0
        # With exactly this much less garbage it is admitted; with one byte less freed it is not.
        roomier = StorageSettings(None if quota is None else quota + lacking, headroom)
        admit(manifest, ledger, roomier, free + lacking)
        with pytest.raises(QuotaExceeded):
            tighter = StorageSettings(None if quota is None else quota + lacking - 1, headroom)
            admit(manifest, ledger, tighter, free + lacking - 1)


def lacking_for(new_bytes: int, ledger: Ledger, limits: StorageSettings, free_bytes: int) -> Shortfall:
    """The shortfall of one new blob in a store without volumes."""
    return SpaceDemand({"": new_bytes}, {}, new_bytes).shortfall(ledger, limits, [store_space(ledger, free_bytes)])


def sized(sizes: dict[str, int], uses: Iterable[str] | None = None) -> Ledger:
    """A ledger with a model of its own blob per name, least recently used first."""
    blobs = {f"{n:064x}": size for n, size in enumerate(sizes.values())}
    models = {model_id(f"org/{name}", "c" * 40): blob for name, blob in zip(sizes, blobs, strict=True)}
    return build_ledger(
        blobs,
        manifests=[manifest_of(model, [blob], blobs) for model, blob in models.items()],
        last_uses={model_id(f"org/{name}", "c" * 40): float(n) for n, name in enumerate(uses or sizes)},
    )


def names(made: EvictionPlan) -> list[str]:
    return [repo_of(v.model).partition("/")[2] for v in made.victims]


def test_of_1_2_and_60_oldest_first_only_the_60_is_taken_for_50() -> None:
    ledger = sized({"one": 1, "two": 2, "sixty": 60})
    lacking = lacking_for(50, ledger, StorageSettings(70, 0), 10**9)
    made = plan_eviction(lacking.required_bytes, ledger, ledger.uses.last_uses, {})
    assert (made.required_bytes, names(made), made.freed_bytes, made.evictable_bytes) == (43, ["sixty"], 60, 63)


def test_if_everything_is_not_enough_nothing_is_evicted() -> None:
    ledger = sized({"one": 1, "two": 2})
    ledger.add_blob("f" * 64, 5)
    made = plan_eviction(9, ledger, ledger.uses.last_uses, {})
    assert made == EvictionPlan(required_bytes=9, enough=False, evictable_bytes=8)


def test_garbage_that_is_enough_spares_every_model() -> None:
    ledger = sized({"one": 1, "two": 2})
    ledger.add_blob("f" * 64, 5)
    made = plan_eviction(5, ledger, ledger.uses.last_uses, {})
    assert (made.garbage, made.garbage_bytes, made.victims, made.enough) == (["f" * 64], 5, [], True)
    assert find_garbage(ledger) == ["f" * 64]


def test_a_shared_blob_is_freed_by_the_last_of_its_models() -> None:
    shared, own = "a" * 64, {n: f"{n:064x}" for n in range(3)}
    blobs = {shared: 100, **dict.fromkeys(own.values(), 1)}
    ledger = ledger_of({NAMES[n]: {shared, own[n]} for n in range(3)}, blobs)
    for n in range(3):
        ledger.uses.record_use(NAMES[n], float(n))
    made = plan_eviction(100, ledger, ledger.uses.last_uses, {})
    assert [v.freed_bytes for v in made.victims] == [1, 1, 101]
    kept = plan_eviction(100, ledger, ledger.uses.last_uses, {NAMES[2]: "pinned"})
    assert (kept.enough, kept.evictable_bytes) == (False, 2)


def test_two_models_that_share_a_blob_are_spared_by_a_third() -> None:
    blobs = {f"{n:064x}": size for n, size in enumerate([10, 1, 1, 30])}
    shared, first, second, large = blobs
    ledger = ledger_of({NAMES[0]: {shared, first}, NAMES[1]: {shared, second}, NAMES[2]: {large}}, blobs)
    for n in range(3):
        ledger.uses.record_use(NAMES[n], float(n))
    made = plan_eviction(30, ledger, ledger.uses.last_uses, {})
    assert [(v.model, v.freed_bytes) for v in made.victims] == [(NAMES[2], 30)]


def test_what_is_kept_is_kept_for_the_reason_that_counts_most() -> None:
    ledger = sized({"pinned": 1, "used": 1, "coming": 1, "free": 1})
    here = {repo_of(m).partition("/")[2]: m for m in ledger.manifests}
    for model in (here["pinned"], model_id("org/not-here", "c" * 40)):
        ledger.uses.pin(model)
    ledger.arrivals.reserve(here["coming"], [])
    ledger.arrivals.reserve_blob("e" * 64, 7, model_id("org/new", "c" * 40))
    stage = StageSpec(rank=0, node="node-a", first_layer=0, last_layer=1)
    specs = [
        InstanceSpec(id=f"i-{name}", repo=f"org/{name}", commit="c" * 40, stages=[stage], context_tokens=1)
        for name in ("used", "pinned", "absent")
    ]
    assert users_of(specs, [], "node-b") == {}
    assert protected_models(ledger, users_of(specs, [], "node-a")) == {
        here["pinned"]: "pinned",
        here["used"]: "used by instance i-used",
        here["coming"]: "being fetched",
        "org/new@" + "c" * 40: "being fetched",
    }


def test_a_refusal_lists_what_could_be_evicted_and_how() -> None:
    ledger, wanted = (
        sized({"one": 1, "two": 2, "sixty": 60}),
        manifest_of(model_id("org/new", "d" * 40), ["b" * 64], SIZES | {"b" * 64: 50}),
    )
    limits = StorageSettings(70, 0)
    with pytest.raises(QuotaExceeded) as refused:
        admit(wanted, ledger, limits, 10**9)
    need = refused.value.details["shortfall_bytes"]
    enough = with_eviction_hint(refused.value, plan_eviction(need, ledger, ledger.uses.last_uses, {}), "manual")
    assert enough.message.endswith(
        "evicting 1 model would free 60 B: set eviction_policy to lru with `shoal storage set`"
    )
    assert enough.details["would_evict"] == ["org/sixty@" + "c" * 40]
    assert (enough.details["evictable_bytes"], enough.details["needed_bytes"]) == (63, 50)
    kept = {model_id("org/sixty", "c" * 40): "pinned"}
    short = with_eviction_hint(refused.value, plan_eviction(need, ledger, ledger.uses.last_uses, kept), "lru")
    assert short.message.endswith("3 B evictable, 43 B needed; 1 model is pinned or in use")
    assert (short.details["evictable_bytes"], short.details["would_evict"]) == (3, [])


def test_a_plan_of_very_much_garbage_still_fits_a_message() -> None:
    ledger = build_ledger(
        {f"{n:064x}": 1 for n in range(50_000)},
        reservations={model_id(f"org/model-{n}", "c" * 40): [] for n in range(50_000)},
    )
    made = to_message(plan_eviction(50_000, ledger, {}, protected_models(ledger, {})))
    assert len(encode(made)) < 500_000 and made.garbage_bytes == 50_000
    assert decode(encode(made), EvictionPlan) == made
