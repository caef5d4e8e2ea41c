"""The volume for each blob, and plans over several volumes: as a property, over arbitrary disks."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import QuotaExceeded
from shoal_common.messages.storage import EvictionPlan
from shoal_common.names import ModelId, model_id
from shoal_common.settings.node import StorageSettings
from shoal_storage.admission.admission import admit, available_by_volume, space_demand
from shoal_storage.admission.allocator import VolumeSpace, allocate, shortfall_bytes
from shoal_storage.eviction.planner import find_garbage, garbage_bytes_of, plan_eviction, protected_models
from shoal_storage.ledger.ledger import Ledger
from shoal_storage.ledger.references import blobs_freed_by, referenced_blobs
from tests.storage.ledger_builder import build_ledger
from tests.storage.unit.test_eviction_planner import BLOB_SETS, LEDGERS, NAMES, SIZES, manifest_of

VOLUMES = ["", "one", "two"]
NEW = model_id("org/new", "d" * 40)
FREE_SPACE = st.dictionaries(st.sampled_from(VOLUMES[1:]), st.integers(-10, 60), max_size=2).flatmap(
    lambda volumes: st.integers(-10, 60).map(lambda room: {"": room, **volumes})
)
BLOBS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), max_size=6)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """Blobs, free space, and blobs that fit one volume only."""
    blobs, free = draw(BLOBS), draw(FREE_SPACE)
    bound = draw(st.dictionaries(st.sampled_from(sorted(blobs)), st.sampled_from(sorted(free)))) if blobs else {}
    return blobs, free, bound


def fits(blobs: dict[str, int], free: dict[str, int], placed: dict[str, str]) -> bool:
    """Whether every volume has space for all it gets."""
    taken = Counter[str]()
    for blob, volume in placed.items():
        taken[volume] += blobs[blob]
    return all(not size or size <= free.get(volume, 0) for volume, size in taken.items())


def any_way(blobs: dict[str, int], free: dict[str, int], bound: dict[str, str]) -> bool:
    """By trying all assignments."""
    names = sorted(blobs)
    ways = itertools.product(*([bound[b]] if b in bound else sorted(free) for b in names))
    return any(fits(blobs, free, dict(zip(names, way, strict=True))) for way in ways)


@given(pieces())
def test_I3_no_volume_is_given_more_than_its_free_space(
    case: tuple[dict[str, int], dict[str, int], dict[str, str]],
) -> None:
    blobs, free, bound = case
    placed = allocate(blobs, free, bound)
    if placed is not None:
        assert placed.keys() == blobs.keys() and set(placed.values()) <= free.keys()
        assert fits(blobs, free, placed)
        assert all(placed[b] == volume for b, volume in bound.items())


@given(pieces())
def test_blobs_are_refused_only_if_there_is_no_way_to_place_them(
    case: tuple[dict[str, int], dict[str, int], dict[str, str]],
) -> None:
    blobs, free, bound = case
    assert (allocate(blobs, free, bound) is not None) == any_way(blobs, free, bound)


@given(pieces())
def test_the_allocator_finds_a_way_exactly_when_none_is_lacking(
    case: tuple[dict[str, int], dict[str, int], dict[str, str]],
) -> None:
    blobs, free, bound = case
    lacking = shortfall_bytes(blobs, free, bound)
    assert (lacking == 0) == (allocate(blobs, free, bound) is not None)
    assert allocate(blobs, {volume: room + lacking for volume, room in free.items()}, bound) is not None


@given(BLOBS, FREE_SPACE)
def test_blobs_of_a_model_stay_together_and_in_the_store_first(blobs: dict[str, int], free: dict[str, int]) -> None:
    placed, total = allocate(blobs, free, {}), sum(blobs.values())
    takes_all = [volume for volume, room in free.items() if total <= max(room, 0)]
    if blobs and takes_all:
        assert placed is not None
        most = max(free[volume] for volume in takes_all)
        (only,) = set(placed.values())
        assert only == "" if "" in takes_all else free[only] == most


def test_a_model_of_many_files_is_allocated_quickly() -> None:
    blobs = {f"shard-{n}": 5_000 for n in range(40)} | {f"small-{n}": 1 for n in range(5_000)}
    placed = allocate(blobs, {"": 103_000, "one": 103_000}, {})
    assert placed is not None and fits(blobs, {"": 103_000, "one": 103_000}, placed)
    # Bytes would be enough; pieces do not fit: said within bounds.
    assert allocate({f"shard-{n}": 5_000 for n in range(40)}, {"": 102_499, "one": 97_501}, {}) is None


@st.composite
def disks(draw: st.DrawFn) -> tuple[Ledger, dict[ModelId, str], list[VolumeSpace], StorageSettings, set[str]]:
    """A ledger over several volumes, what is protected, what is free, and what is to be downloaded."""
    ledger = draw(LEDGERS)
    for model in ledger.stored_manifests:
        ledger.uses.record_use(model, float(draw(st.integers(0, 3))))
    arriving = [b for b in sorted(SIZES) if b not in ledger.blobs]
    if bool(arriving) and draw(st.booleans()):
        blob = draw(st.sampled_from(arriving))
        ledger.arrivals.reserve_blob(blob, SIZES[blob], draw(st.sampled_from(NAMES)))
    for blob in sorted({*ledger.blobs, *ledger.arrivals.partials}):
        ledger.move_blob(blob, draw(st.sampled_from(VOLUMES)))
    twice: set[str] = draw(st.sets(st.sampled_from(sorted(ledger.blobs)), max_size=2)) if ledger.blobs else set()
    for blob in sorted(twice):
        other = next(r for r in VOLUMES if r != ledger.volume_by_blob.get(blob, ""))
        ledger.add_copy(blob, other, ledger.blobs[blob])
    in_flight = ledger.arrivals.in_flight_by_volume
    spaces = [VolumeSpace(r, r or "the store", draw(st.integers(0, 150)), in_flight[r]) for r in VOLUMES]
    limits = StorageSettings(draw(st.none() | st.integers(0, 300)), draw(st.integers(0, 10)), "lru")
    for model in draw(st.sets(st.sampled_from(NAMES), max_size=1)):
        ledger.uses.pin(model)
    new = draw(BLOB_SETS)
    ledger.arrivals.reserve(NEW, new)  # before planning, as the service does: else it could be evicted for itself
    return ledger, protected_models(ledger, {}), spaces, limits, new


Case = tuple[Ledger, dict[ModelId, str], list[VolumeSpace], StorageSettings, set[str]]


def made_for(case: Case, need: int) -> EvictionPlan:
    ledger, kept, spaces, limits, new = case
    manifest = manifest_of(NEW, sorted(new), SIZES)
    return plan_eviction(
        need,
        ledger,
        ledger.uses.last_uses,
        kept,
        space_demand(manifest, ledger).met_after_freeing(ledger, limits, spaces),
    )


def carry_out(made: EvictionPlan, ledger: Ledger, spaces: list[VolumeSpace]) -> list[VolumeSpace]:
    """Apply a plan, giving freed bytes back to their volume. Returns the free space then."""
    free = Counter({s.volume_id: s.free_bytes for s in spaces})
    free.update(garbage_bytes_of(made.garbage, ledger))
    needed = referenced_blobs(ledger)
    for blob in made.garbage:
        ledger.drop_copies(blob)
        if blob not in needed:
            ledger.drop_blob(blob)
    for victim in made.victims:
        for blob in blobs_freed_by(victim.model, ledger):
            if blob in ledger.blobs:
                free[ledger.volume_by_blob.get(blob, "")] += ledger.blobs[blob]
                ledger.drop_blob(blob)
        ledger.drop_manifest(victim.model)
    return [VolumeSpace(s.volume_id, s.path, free[s.volume_id], s.in_flight_bytes) for s in spaces]


@given(disks())
def test_I3_a_plan_over_several_volumes_frees_where_blobs_go(case: Case) -> None:
    ledger, _, spaces, limits, new = case
    manifest = manifest_of(NEW, sorted(new), SIZES)
    try:
        admission = admit(manifest, ledger, limits, spaces[0].free_bytes, spaces)
    except QuotaExceeded as refused:
        need = refused.details["shortfall_bytes"]
        assert need > 0
        made = made_for(case, need)
        if not made.enough:
            assert not made.victims and not made.garbage, "all or nothing"
            return
        before = ledger.used_bytes
        spaces = carry_out(made, ledger, spaces)
        assert before - ledger.used_bytes == made.freed_bytes
        admission = admit(manifest, ledger, limits, spaces[0].free_bytes, spaces)
    free = available_by_volume(spaces, limits)
    asked = space_demand(manifest, ledger)
    assert admission.volume_by_blob.keys() == set(admission.missing)
    if asked.needed_bytes:
        assert fits(dict(asked.blobs), free, {b: admission.volume_by_blob[b] for b in asked.blobs})


@given(disks())
def test_no_victim_of_a_plan_over_several_volumes_is_needless(case: Case) -> None:
    ledger, kept, spaces, limits, new = case
    manifest = manifest_of(NEW, sorted(new), SIZES)
    try:
        admit(manifest, ledger, limits, spaces[0].free_bytes, spaces)
    except QuotaExceeded as refused:
        made = made_for(case, refused.details["shortfall_bytes"])
    else:
        return
    assert not {v.model for v in made.victims} & kept.keys()
    met = space_demand(manifest, ledger).met_after_freeing(ledger, limits, spaces)
    victims = [v.model for v in made.victims]
    for spared in victims:
        rest = [m for m in victims if m != spared]
        freed = garbage_bytes_of(made.garbage, ledger)
        gone = ledger.blobs.keys() - referenced_blobs(ledger, rest) - set(made.garbage)
        for blob in gone:
            freed[ledger.volume_by_blob.get(blob, "")] += ledger.blobs[blob]
        assert not met(freed), f"{spared} need not have gone"


def test_a_second_copy_of_a_used_blob_is_garbage_on_its_volume() -> None:
    blob = next(iter(SIZES))
    ledger = build_ledger({blob: 5})
    ledger.add_copy(blob, "one", 5)
    assert find_garbage(ledger) == [blob] and garbage_bytes_of([blob], ledger) == {"": 5, "one": 5}
    ledger.seal(manifest_of(NAMES[0], [blob], {blob: 5}))
    assert garbage_bytes_of(find_garbage(ledger), ledger) == {"one": 5}


def test_a_refusal_has_the_figures_of_every_volume() -> None:
    manifest = manifest_of(NEW, ["e" * 64], {"e" * 64: 70})
    spaces = [VolumeSpace("", "the store", 50, 0), VolumeSpace("one", "/mnt/big", 60, 5)]
    with pytest.raises(QuotaExceeded, match="the store has 40 B available, /mnt/big has 45 B available") as refused:
        admit(manifest, Ledger(), StorageSettings(None, 10), 50, spaces)
    assert refused.value.details["volumes"] == [
        {"path": "the store", "free_bytes": 50, "in_flight_bytes": 0, "room_bytes": 40},
        {"path": "/mnt/big", "free_bytes": 60, "in_flight_bytes": 5, "room_bytes": 45},
    ]
    assert refused.value.details["shortfall_bytes"] == 25
