"""From a request to a layout: tiers, constraints, named layouts, previews."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.errors import BadInput, NoMemory, NotFound
from shoal_common.messages.downloads import DownloadPhase, DownloadState
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.model_shape import ModelSize
from shoal_common.messages.placement import ListFits, PlaceCommand
from shoal_common.messages.storage import ShardState
from shoal_common.names import model_id, repo_of
from shoal_placement.planning.cluster_facts import ClusterFacts
from shoal_placement.planning.memory_tiers import Tier
from shoal_placement.planning.plan import PlacementPlan
from shoal_placement.planning.planner import plan_layout, plan_previews
from shoal_placement.planning.previews import list_fitting_models, to_previews
from shoal_placement.planning.requests import DEFAULT_IN_FLIGHT, is_held, requests_in_flight, with_remote_model
from tests.placement.unit.test_cluster_facts import COMMIT, SHAPE, world
from tests.placement.unit.test_cluster_facts import held as has

MIB = 1 << 20
MODEL = "org/tiny-fish"
RANKS: dict[Tier, int] = {"fits": 0, "tight": 1, "force": 2}


def asks(**more: Any) -> PlaceCommand:
    """Return a request for the model of these tests: four layers of 100 MiB, embedding and head."""
    return PlaceCommand(model=MODEL, **more)


def machines(free_and_total_mib: Mapping[str, tuple[int, int]], **more: Any) -> ClusterFacts:
    """Return nodes with this much free and total memory; the first holds the model."""
    there = world(dict.fromkeys(free_and_total_mib, 1), [has(min(free_and_total_mib))])
    facts = {
        n: NodeFacts(memory_available_bytes=free * MIB, memory_total_bytes=total * MIB, **more)
        for n, (free, total) in free_and_total_mib.items()
    }
    return structs.replace(there, inference_facts=facts)


def nodes(found: PlacementPlan) -> list[str]:
    return [s.node for s in found.layout.slices]


def test_what_fits_somewhere_is_never_placed_by_force() -> None:
    there = machines({"a": (300, 20000), "b": (1000, 1000)})
    assert (plan_layout(asks(force=True), there).tier, nodes(plan_layout(asks(force=True), there))) == ("fits", ["b"])


def test_the_same_cluster_gives_the_same_layout_in_any_order() -> None:
    memory = {"a": (300, 300), "b": (400, 400), "c": (300, 300), "d": (300, 300)}
    there = machines(memory)
    turned = structs.replace(there, inference_facts=dict(reversed(list(there.inference_facts.items()))))
    layout = plan_layout(asks(min_nodes=2), there).layout
    assert len(layout.slices) == 3
    assert plan_layout(asks(min_nodes=2), turned).layout == layout


def test_low_memory_has_to_be_allowed_and_is_shown() -> None:
    there = machines({"a": (300, 4000)})
    with pytest.raises(NoMemory, match="--allow-low-memory") as refused:
        plan_layout(asks(), there)
    assert refused.value.details["tier"] == "tight"
    (figures,) = refused.value.details["nodes"]
    assert figures["available_bytes"] == 300 * MIB < figures["tight_bytes"] < figures["total_bytes"] == 4000 * MIB
    found = plan_layout(asks(allow_low_memory=True), there)
    assert found.tier == "tight"
    shown = to_previews([found], there.inference_facts, 1).previews[0]
    assert shown.is_low_memory and shown.stages[0].bytes_to_free == found.layout.slices[0].bytes - 300 * MIB


def test_only_force_takes_the_systems_reserve() -> None:
    whole = plan_layout(asks(), machines({"a": (5000, 5000)})).layout.slices[0].bytes
    there = machines({"a": (100, whole // MIB + 1)})
    with pytest.raises(NoMemory, match="--force") as refused:
        plan_layout(asks(allow_low_memory=True), there)
    assert refused.value.details["tier"] == "force"
    assert plan_layout(asks(force=True), there).tier == "force"
    with pytest.raises(NoMemory, match="add a node"):
        plan_layout(asks(force=True), machines({"a": (100, whole // MIB - 1)}))


def test_nodes_are_left_out_and_layers_are_counted_as_asked() -> None:
    there = machines({"a": (5000, 5000), "b": (5000, 5000), "c": (5000, 5000)})
    assert "a" not in nodes(plan_layout(asks(excluded_nodes=["a"]), there))
    found = plan_layout(asks(layers={"b": 3, "c": 1}), there)
    assert {s.node: s.last - s.first for s in found.layout.slices} == {"b": 3, "c": 1}
    with pytest.raises(NotFound, match="on z"):
        plan_layout(asks(layers={"z": 1}), there)


def test_unfused_attention_raises_needed_and_not_available_bytes() -> None:
    shape = structs.replace(SHAPE, score_bytes=64, fused_score_bytes=8, chunk_bytes_per_token=50, head_dim=64)
    model = has("a", shape=shape)
    needs = {}
    for accelerator in ("metal", "cpu"):
        there = structs.replace(machines({"a": (3000, 6000)}, accelerator=accelerator), models=[model])
        (stage,) = to_previews(plan_previews(asks(), there), there.inference_facts, 1).previews[0].stages
        assert stage.available_bytes == 3000 * MIB
        needs[accelerator] = stage.needed_bytes
    more = needs["cpu"] - needs["metal"]
    assert more == 2048 * 4096 * (64 - 8)
    # Enough for a node that fuses attention, too little for one that does not.
    free_mib = needs["metal"] // MIB + 1
    fits = structs.replace(machines({"a": (free_mib, free_mib)}, accelerator="metal"), models=[model])
    assert plan_layout(asks(), fits).tier == "fits"
    for layout in ("", "a:4"):
        with pytest.raises(NoMemory) as refused:
            plan_layout(asks(layout=layout), structs.replace(machines({"a": (free_mib, free_mib)}), models=[model]))
        (figures,) = refused.value.details["nodes"]
        assert figures["available_bytes"] == free_mib * MIB and figures["needed_bytes"] > more


def test_faster_memory_is_preferred_and_a_download_is_bounded() -> None:
    there = machines({"a": (5000, 5000), "b": (5000, 5000)})
    fast = structs.replace(there.inference_facts["b"], idle_bandwidth_bytes_per_s=800e9)
    slow = structs.replace(there.inference_facts["a"], idle_bandwidth_bytes_per_s=100e9)
    there = structs.replace(there, inference_facts={"a": slow, "b": fast})
    assert nodes(plan_layout(asks(), there)) == ["b"]
    assert nodes(plan_layout(asks(max_fetch_bytes=0), there)) == ["a"]


def test_a_node_that_has_the_layers_is_preferred() -> None:
    there = machines({"a": (250, 250), "b": (800, 800), "c": (800, 800)})
    part = ShardState(node="c", repo=MODEL, commit=COMMIT, layers=[[0, 4]], size_bytes=1, total_bytes=1)
    assert nodes(plan_layout(asks(), structs.replace(there, shards=[part]))) == ["c"]
    assert plan_layout(asks(), structs.replace(there, shards=[part])).layout.fetch_bytes == 0


def test_a_node_with_a_shard_is_preferred_in_proportion() -> None:
    there = machines({"a": (250, 250), "b": (800, 800), "c": (800, 800), "d": (800, 800)})
    size = sum(SHAPE.layer_bytes) + SHAPE.embed_bytes + SHAPE.head_bytes
    there = structs.replace(there, models=[has("a", size_bytes=size)])

    def arrived(node: str, done: int, phase: DownloadPhase = "paused", commit: str = COMMIT) -> DownloadState:
        return DownloadState(node=node, model=f"{MODEL}@main", phase=phase, commit=commit, done_bytes=done)

    some = [arrived("b", size // 4, "fetching"), arrived("c", size // 2), arrived("d", size, commit="f" * 40)]
    found = plan_layout(asks(), structs.replace(there, downloads=some))
    assert nodes(found) == ["c"] and found.layout.fetch_bytes == pytest.approx(size / 2, rel=0.01)
    assert plan_layout(asks(), structs.replace(there, downloads=some[2:])).layout.fetch_bytes == size


def test_objectives_set_how_many_answers_a_layout_is_for() -> None:
    assert requests_in_flight(asks()) == 1
    assert requests_in_flight(asks(objective="balanced")) == 0
    assert requests_in_flight(asks(objective="throughput")) == DEFAULT_IN_FLIGHT
    assert requests_in_flight(asks(objective="throughput", in_flight=9)) == 9
    there = machines(dict.fromkeys("abcd", (5000, 5000)))
    assert len(nodes(plan_layout(asks(), there))) == 1
    assert len(nodes(plan_layout(asks(objective="throughput", in_flight=8), there))) > 1


def test_a_preview_can_be_chosen_by_name_until_it_no_longer_fits() -> None:
    there = machines({"a": (400, 4000), "b": (400, 4000), "c": (900, 4000)})
    shown = plan_previews(asks(), there)
    assert nodes(shown[0]) == nodes(plan_layout(asks(), there))
    (over_two,) = (p for p in shown if len(nodes(p)) == 2 and p.tier == "fits")
    chosen = plan_layout(asks(layout=over_two.name), there)
    assert (chosen.name, chosen.tier) == (over_two.name, "fits")
    less = structs.replace(
        there,
        inference_facts={
            **there.inference_facts,
            **machines(dict.fromkeys(nodes(over_two), (1, 4000))).inference_facts,
        },
    )
    with pytest.raises(NoMemory) as refused:
        plan_layout(asks(layout=over_two.name), less)
    assert refused.value.details["tier"] == "tight"
    assert plan_layout(asks(layout=over_two.name, allow_low_memory=True), less).tier == "tight"


@pytest.mark.parametrize("name", ["a", "a:0", "a:4,", ":4", "a:x", "a:4:4,b", "a:2,a:2", "a:3", "a:5", "a:٣,b:1"])
def test_what_names_no_layout_of_the_model_is_refused(name: str) -> None:
    there = machines({"a": (5000, 5000), "b": (5000, 5000)})
    with pytest.raises((BadInput, NotFound)):
        plan_layout(asks(layout=name), there)
    with pytest.raises((BadInput, NotFound)):
        plan_previews(asks(layout=name), there)


memory = st.tuples(st.integers(0, 900), st.integers(0, 2000)).map(lambda m: (min(m), max(m)))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), memory, min_size=1), st.integers(1, 3), st.booleans(), st.booleans())
def test_place_does_what_a_preview_showed_and_refuses_others(
    sizes: dict[str, tuple[int, int]], min_nodes: int, allow: bool, force: bool
) -> None:
    there, request = machines(sizes), asks(min_nodes=min_nodes, allow_low_memory=allow, force=force)
    most: Tier = "force" if force else "tight" if allow else "fits"
    try:
        shown = plan_previews(request, there)
    except NoMemory:
        shown = []
    assert [RANKS[p.tier] for p in shown] == sorted(RANKS[p.tier] for p in shown)
    for p in shown:
        for s in p.layout.slices:
            assert s.bytes <= p.budgets[s.node].of(p.tier)
        again = plan_layout(structs.replace(request, layout=p.name, force=True), there)
        assert again.name == p.name and RANKS[again.tier] <= RANKS[p.tier]
    able = [p for p in shown if RANKS[p.tier] <= RANKS[most]]
    if not able:
        with pytest.raises(NoMemory):
            plan_layout(request, there)
        return
    found = plan_layout(request, there)
    assert found.tier == able[0].tier
    assert found.layout.cost_s <= able[0].layout.cost_s * 1.002  # of equal ones the emptiest, within a thousandth


def test_a_model_nobody_has_is_previewed_as_a_full_download() -> None:
    there = structs.replace(machines({"a": (5000, 5000), "b": (400, 5000)}), models=[])
    assert not is_held(MODEL, there)
    size = ModelSize(model=model_id(MODEL, COMMIT), size_bytes=7, shape=SHAPE)
    shown = plan_previews(asks(), with_remote_model(there, MODEL, size))
    assert nodes(shown[0]) == ["a"]
    assert shown[0].layout.fetch_bytes == sum(SHAPE.layer_bytes) + SHAPE.embed_bytes + SHAPE.head_bytes
    with pytest.raises(NotFound, match="shoal pull"):
        plan_layout(asks(), there)


def test_fitting_models_are_listed_first_and_larger_ones_first() -> None:
    there = machines({"a": (700, 800), "b": (1, 2500)})
    layer = SHAPE.layer_bytes[0]
    sizes = {"org/one": 1, "org/four": 4, "org/twelve": 12, "org/hundred": 100}
    models = [
        has("a", repo=repo, size_bytes=count, shape=structs.replace(SHAPE, layer_bytes=[layer] * count))
        for repo, count in sizes.items()
    ]
    there = structs.replace(there, models=[*models, has("b", repo="org/picture", shape=None, shape_error="no text")])
    listed = list_fitting_models(ListFits(), there).models
    assert [(repo_of(f.model), f.tier) for f in listed] == [
        ("org/four", "fits"),
        ("org/one", "fits"),
        ("org/twelve", "tight"),
        ("org/hundred", ""),
        ("org/picture", ""),
    ]
    assert "does not fit" in listed[3].reason and "no text" in listed[4].reason
    assert all((f.preview is None) == (f.tier == "") for f in listed)
