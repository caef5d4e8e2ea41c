"""Replanned instances, and better layouts that are proposed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from shoal_common.errors import NoMemory
from shoal_common.messages.instances import InstanceSpec, PlacementConstraints
from shoal_placement.planning.cluster_facts import ClusterFacts
from shoal_placement.planning.memory_model import reserved_bytes
from shoal_placement.planning.plan import layout_name
from shoal_placement.planning.rebalance import rebalances, replan
from tests.placement.unit.test_cluster_facts import held, world
from tests.placement.unit.test_migration_plan import runs
from tests.placement.unit.test_planner import machines

memory_mib = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(200, 900), st.integers(900, 1500)))


def with_instances(there: ClusterFacts, *specs: InstanceSpec) -> ClusterFacts:
    """Return the cluster with these instances, whose stages occupy all of their reservations."""
    there = structs.replace(there, instances=specs)
    stages = reserved_bytes(there.instances, there.models, there.inference_facts)
    facts = {
        n: structs.replace(
            f,
            stages=stages.get(n, {}),
            memory_available_bytes=max(f.memory_available_bytes - sum(stages.get(n, {}).values()), 0),
        )
        for n, f in there.inference_facts.items()
    }
    return structs.replace(there, inference_facts=facts)


def test_an_instance_is_replanned_as_requested_into_its_memory() -> None:
    spec = runs("i", "a", "b", asked=PlacementConstraints(min_nodes=2, max_nodes=2, nodes=["a", "b", "c"]))
    there = world({"a": 600, "c": 600, "d": 5000}, [held("a")], [spec])
    fresh = replan(spec, there)
    assert (fresh.id, fresh.epoch, fresh.created_at_s, fresh.constraints) == ("i", 5, 1.0, spec.constraints)
    assert {s.node for s in fresh.stages} == {"a", "c"}
    with pytest.raises(NoMemory):
        replan(spec, world({"a": 600, "d": 5000}, [held("a")], [spec]))


def test_a_faster_layout_is_proposed_with_its_gain_only() -> None:
    spec = runs("i", "a", "b")
    there = with_instances(machines({"a": (2000, 4000), "b": (2000, 4000)}), spec)
    (found,) = rebalances(there).rebalances
    assert (found.instance, found.current.layout) == ("i", "a:2,b:2")
    assert (found.proposed.layout, found.proposed.fetch_bytes) == ("a:4", 0), "a holds the model"
    assert found.gain > 1.1 and found.proposed.tokens_per_s > found.current.tokens_per_s
    fresh = replan(spec, there, found.proposed.layout)
    assert layout_name(fresh.stages) == "a:4" and fresh.epoch == spec.epoch + 1
    assert rebalances(with_instances(machines({"a": (2000, 4000), "b": (2000, 4000)}), fresh)).rebalances == []


def test_a_better_tier_is_proposed_even_where_it_is_slower() -> None:
    spec = structs.replace(runs("i", "a", asked=PlacementConstraints(allow_low_memory=True)), tier="tight")
    memory = {"a": (500, 4000), "b": (500, 4000)}
    (found,) = rebalances(structs.replace(machines(memory), instances=[spec])).rebalances
    assert (found.current.tier, found.proposed.tier) == ("tight", "fits") and found.gain < 1


def test_an_instance_that_lost_a_node_is_left_to_the_migrator() -> None:
    there = structs.replace(machines({"a": (2000, 4000)}), instances=[runs("i", "a", "b")])
    assert rebalances(there).rebalances == []


@given(memory_mib, st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
@settings(deadline=None)
def test_a_proposal_fits_beside_all_and_is_made_only_once(
    memory: dict[str, tuple[int, int]], nodes: list[str]
) -> None:
    if not memory:
        return
    spec, bare = runs("i", *nodes), machines(memory)
    there = with_instances(bare, spec)
    for found in rebalances(there).rebalances:
        fresh = replan(spec, there, found.proposed.layout)
        taken = reserved_bytes([fresh], there.models, there.inference_facts)
        for node, stages in taken.items():
            has = there.inference_facts[node].memory_available_bytes + sum(
                there.inference_facts[node].stages.values()
            )
            assert sum(stages.values()) <= has
        assert found.current.tier != found.proposed.tier or found.gain >= 1.1
        assert rebalances(with_instances(bare, fresh)).rebalances == []
