"""The three memory tiers of a node: each is at least the one before, and none exceeds the memory there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_common.messages.liveness import NodeFacts
from shoal_placement.planning.memory_tiers import MemoryTiers, memory_tiers, system_reserve_bytes, tier_of

GIB = 1 << 30
BYTES = st.integers(0, 64 * GIB)
STAGES = st.dictionaries(st.sampled_from(["i/0", "i/1", "j/0"]), BYTES, max_size=3)


@st.composite
def nodes(draw: st.DrawFn) -> tuple[NodeFacts, dict[str, int]]:
    total = draw(BYTES)
    facts = NodeFacts(
        memory_total_bytes=total,
        memory_available_bytes=draw(st.integers(0, total)),
        accelerator_bytes=draw(st.none() | st.integers(0, total)),
        stages=draw(STAGES),
    )
    return facts, draw(STAGES)


@given(nodes())
def test_each_tier_has_at_least_the_memory_of_the_one_before(node: tuple[NodeFacts, dict[str, int]]) -> None:
    room = memory_tiers(*node)
    assert room.fits_bytes <= room.tight_bytes <= room.force_bytes


@given(nodes(), st.integers(0, 1 << 40))
def test_no_tier_takes_reserved_bytes_or_exceeds_the_accelerator(
    node: tuple[NodeFacts, dict[str, int]], needed: int
) -> None:
    facts, reserved = node
    taken = sum(max(reserved.get(k, 0), facts.stages.get(k, 0)) for k in {*reserved, *facts.stages})
    limit = facts.memory_total_bytes if facts.accelerator_bytes is None else facts.accelerator_bytes
    tier = tier_of(needed, memory_tiers(facts, reserved))
    if tier is not None:
        assert taken + needed <= limit
    if tier == "fits":
        to_come = sum(max(own - facts.stages.get(k, 0), 0) for k, own in reserved.items())
        assert needed + to_come <= facts.memory_available_bytes
    if tier == "tight":
        assert taken + needed <= facts.memory_total_bytes - system_reserve_bytes(facts.memory_total_bytes)


@given(nodes(), BYTES, BYTES)
def test_reserving_more_never_leaves_more(node: tuple[NodeFacts, dict[str, int]], more: int, needed: int) -> None:
    facts, reserved = node
    before, after = memory_tiers(facts, reserved), memory_tiers(facts, {**reserved, "new/0": more})
    assert after.fits_bytes == before.fits_bytes - more
    assert after.force_bytes == before.force_bytes - more
    assert after.tight_bytes == before.tight_bytes - more


def test_a_machine_keeps_a_tenth_for_its_system_up_to_4_gib() -> None:
    assert system_reserve_bytes(10 * GIB) == GIB
    assert system_reserve_bytes(512 * GIB) == 4 * GIB


def test_the_first_sufficient_tier_is_named() -> None:
    facts = NodeFacts(memory_total_bytes=10 * GIB, memory_available_bytes=4 * GIB)
    room = memory_tiers(facts, {})
    assert room == MemoryTiers(4 * GIB, 9 * GIB, 10 * GIB)
    assert [tier_of(n * GIB, room) for n in (4, 5, 10, 11)] == ["fits", "tight", "force", None]
