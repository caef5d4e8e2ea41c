"""What a model needs, layer by layer, and what is reserved of a node: counted once, whether loaded or not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.messages.instances import InstanceSpec, StageSpec
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.model_shape import KvRule, ModelShape
from shoal_common.messages.storage import ModelState
from shoal_placement.planning.memory_model import (
    PREFILL_CHUNK_TOKENS,
    STAGE_OVERHEAD_BYTES,
    cache_bytes,
    max_cached_tokens,
    model_need,
    pass_bytes,
    reserved_bytes,
    unfused_bytes,
)
from shoal_placement.planning.memory_tiers import memory_tiers
from tests.placement.unit.test_cluster_facts import COMMIT, MIB, SHAPE

MIXED = structs.replace(
    SHAPE,
    kv_rules=[
        KvRule(bytes_per_token=1000),
        KvRule(bytes_per_token=1000, window_tokens=512),
        KvRule(constant_bytes=7000),
        KvRule(),
    ],
    chunk_bytes_per_token=50,
    score_bytes=64,
    fused_score_bytes=8,
    head_dim=64,
)
METAL = NodeFacts(accelerator="metal")


def test_the_cache_is_counted_in_steps_of_256_tokens() -> None:
    assert model_need(SHAPE, 1).layer_bytes == model_need(SHAPE, 256).layer_bytes
    assert model_need(SHAPE, 257).layer_bytes[0] == 100 * MIB + 512 * 1024


def test_each_layer_is_counted_by_its_own_rule_for_each_answer() -> None:
    def caches(answers: int = 1) -> list[int]:
        need = model_need(MIXED, 4096, answers, requests=1)
        return [taken - weights for taken, weights in zip(need.layer_bytes, MIXED.layer_bytes, strict=True)]

    window = 512 - 1 + PREFILL_CHUNK_TOKENS
    assert caches() == [4096 * 1000, window * 1000, 7000, 0]
    assert caches(3) == [3 * b for b in caches()]
    # Published by a version with one rule for all layers.
    assert model_need(SHAPE, 300).layer_bytes == [100 * MIB + 512 * 1024] * 4


@given(
    st.integers(1, 5000),
    st.integers(0, 1000),
    st.integers(1, 4),
    st.lists(st.integers(1, 5000), min_size=1, max_size=8),
)
def test_requests_that_share_the_kv_budget_stay_within_it(
    context_tokens: int, window_tokens: int, answers: int, asked: list[int]
) -> None:
    rule = KvRule(bytes_per_token=3, window_tokens=window_tokens, constant_bytes=5)
    room, taken = answers * -(-context_tokens // 256), 0
    for tokens in asked:
        if tokens <= context_tokens and -(-tokens // 256) <= room:
            room -= -(-tokens // 256)
            taken += 3 * max_cached_tokens(rule, tokens, 512) + 5
    assert taken <= cache_bytes(rule, context_tokens, 512, answers, 8)


def test_a_window_has_a_chunk_beside_it_until_the_answer_begins() -> None:
    window = KvRule(bytes_per_token=1, window_tokens=512)
    assert max_cached_tokens(window, 100_000, 2048) == 512 - 1 + 2048
    assert max_cached_tokens(window, 600, 2048) == 600
    assert max_cached_tokens(window, 100, 2048) == 256
    grown = model_need(MIXED, 8192, requests=1).layer_bytes[1] - MIXED.layer_bytes[1]
    assert grown == 1000 * (512 - 1 + PREFILL_CHUNK_TOKENS)


def test_scores_count_where_attention_is_not_fused() -> None:
    fused, whole = pass_bytes(MIXED, 4096, True), pass_bytes(MIXED, 4096, False)
    assert whole - fused == 2048 * 4096 * (64 - 8)
    assert unfused_bytes(MIXED, 4096, METAL) == 0
    assert unfused_bytes(MIXED, 4096, NodeFacts(accelerator="cpu")) == whole - fused
    assert unfused_bytes(structs.replace(MIXED, head_dim=256), 4096, METAL) == whole - fused
    assert model_need(MIXED, 4096).stage_bytes == STAGE_OVERHEAD_BYTES + fused


def test_a_shape_of_an_earlier_version_is_counted_as_it_was() -> None:
    assert pass_bytes(SHAPE, 4096, False) == 0
    assert model_need(SHAPE, 4096).stage_bytes == STAGE_OVERHEAD_BYTES


# What is reserved

SPEC = InstanceSpec(
    id="i",
    repo="org/tiny-fish",
    commit=COMMIT,
    context_tokens=4096,
    stages=[
        StageSpec(rank=0, node="a", first_layer=0, last_layer=1),
        StageSpec(rank=1, node="b", first_layer=1, last_layer=4),
    ],
)


def held(shape: ModelShape = SHAPE) -> list[ModelState]:
    return [ModelState(node="a", repo="org/tiny-fish", commit=COMMIT, size_bytes=1, file_count=1, shape=shape)]


@given(
    total=st.integers(4000, 8000),
    loaded=st.integers(0, 1000),
    others=st.integers(0, 2000),
)
def test_a_stage_needs_the_same_memory_loaded_or_not(total: int, loaded: int, others: int) -> None:
    before = NodeFacts(memory_total_bytes=total * MIB, memory_available_bytes=(total - others) * MIB)
    reserved = reserved_bytes([SPEC], held(), {"a": before})["a"]
    own_bytes = reserved["i/0"]
    occupied = min(loaded * MIB, own_bytes)
    after = structs.replace(
        before,
        memory_available_bytes=before.memory_available_bytes - occupied,
        stages={"i/0": occupied},
    )
    assert memory_tiers(after, reserved) == memory_tiers(before, reserved)
    assert memory_tiers(before, reserved).fits_bytes == before.memory_available_bytes - own_bytes


def test_a_stage_that_exceeds_its_reservation_counts_as_measured() -> None:
    facts = NodeFacts(memory_total_bytes=900, memory_available_bytes=500, stages={"i/0": 300})
    assert memory_tiers(facts, {"i/0": 200}).fits_bytes == 500
    assert memory_tiers(facts, {"i/0": 200}).force_bytes == 600


@pytest.mark.parametrize("accelerator", ["cpu", "metal"])
def test_a_reservation_is_what_the_layout_needs_on_that_node(accelerator: str) -> None:
    facts = {n: NodeFacts(accelerator=accelerator) for n in "ab"}
    reserved = reserved_bytes([SPEC], held(MIXED), facts)
    need = model_need(MIXED, 4096)
    more = unfused_bytes(MIXED, 4096, facts["a"])
    assert reserved["a"]["i/0"] == need.stage_bytes + need.layer_bytes[0] + need.embed_bytes + more
    assert reserved["b"]["i/1"] == need.stage_bytes + sum(need.layer_bytes[1:]) + need.head_bytes + more
