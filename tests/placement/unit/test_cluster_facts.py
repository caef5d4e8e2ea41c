"""What the leader decides: which model is meant, what is free, the state of an instance. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_common.errors import BadInput, BadName, ErrorBody, LoadError, NoMemory, NotFound, Unsupported
from shoal_common.messages.instances import InstanceSpec, InstanceState, StageSpec, StageState
from shoal_common.messages.liveness import NodeFacts
from shoal_common.messages.model_shape import ModelShape
from shoal_common.messages.placement import PlaceCommand
from shoal_common.messages.storage import ModelState
from shoal_common.names import check_id
from shoal_placement.leader.instance_status import instance_status
from shoal_placement.planning import cluster_facts
from shoal_placement.planning.cluster_facts import ClusterFacts, instance_id
from shoal_placement.planning.memory_model import STAGE_OVERHEAD_BYTES, reserved_bytes
from shoal_placement.planning.plan import to_instance_spec
from shoal_placement.planning.planner import plan_layout

MIB = 1 << 20
COMMIT, NEWER = "a" * 40, "b" * 40
SHAPE = ModelShape(
    architecture="qwen3",
    layer_bytes=[100 * MIB] * 4,
    embed_bytes=50 * MIB,
    head_bytes=60 * MIB,
    kv_bytes_per_token_layer=1024,
    context_tokens=32768,
    hidden_bytes=2048,
)
KV_BYTES = 1024 * 4096
WHOLE_BYTES = 4 * (100 * MIB + KV_BYTES) + 110 * MIB


def held(node: str = "a", commit: str = COMMIT, repo: str = "org/tiny-fish", **more: Any) -> ModelState:
    fields = {"size_bytes": 1, "file_count": 1, "revisions": ["main"], "shape": SHAPE, **more}
    return ModelState(node=node, repo=repo, commit=commit, **fields)


def world(
    memory_mib: Mapping[str, int],
    models: Sequence[ModelState] = (),
    instances: Sequence[InstanceSpec] = (),
    alive: Sequence[str] = (),
) -> ClusterFacts:
    facts = {
        n: NodeFacts(memory_available_bytes=m * MIB, memory_total_bytes=2 * m * MIB) for n, m in memory_mib.items()
    }
    return ClusterFacts(
        inference_facts=facts, models=list(models), instances=list(instances), live_nodes={*facts, *alive}
    )


def reserved(there: ClusterFacts) -> dict[str, int]:
    """Return the reserved bytes of each node."""
    found = reserved_bytes(there.instances, there.models, there.inference_facts)
    return {node: sum(stages.values()) for node, stages in found.items()}


def test_plain_org_name_never_means_a_directory_of_a_persons_own() -> None:
    own = held(revisions=["local"])
    assert cluster_facts.find_model("org/tiny-fish@local", world({"a": 1}, [own])) == own
    with pytest.raises(NotFound):
        cluster_facts.find_model("org/tiny-fish", world({"a": 1}, [own]))
    named_by_commit = held(commit=NEWER, revisions=[])
    assert cluster_facts.find_model("org/tiny-fish", world({"a": 1}, [own, named_by_commit])) == named_by_commit


# Which model


def test_a_model_is_placed_where_it_fits() -> None:
    found = plan_layout(PlaceCommand(model="org/tiny-fish"), world({"a": 1000}, [held()]))
    assert (found.model.commit, found.context_tokens) == (COMMIT, 4096)
    (stage,) = found.layout.slices
    assert (stage.node, stage.first, stage.last) == ("a", 0, 4)
    assert stage.bytes == WHOLE_BYTES + STAGE_OVERHEAD_BYTES


def test_a_model_that_no_node_holds_is_not_found_with_a_remedy() -> None:
    with pytest.raises(NotFound, match=r"`shoal pull org/tiny-fish`"):
        plan_layout(PlaceCommand(model="org/tiny-fish"), world({"a": 1000}))


def test_what_only_dead_nodes_hold_is_not_found() -> None:
    with pytest.raises(NotFound):
        plan_layout(PlaceCommand(model="org/tiny-fish"), world({"a": 1000}, [held("dead")]))


def test_a_node_without_inference_may_hold_the_model_for_others() -> None:
    found = plan_layout(PlaceCommand(model="org/tiny-fish"), world({"a": 1000}, [held("store")], alive=["store"]))
    assert [s.node for s in found.layout.slices] == ["a"]


def test_a_name_means_the_newest_commit_and_a_tag_its_own() -> None:
    models = [held(ready_at_s=1.0, revisions=["main", "v1"]), held(commit=NEWER, ready_at_s=2.0)]
    there = world({"a": 1000}, models)
    assert plan_layout(PlaceCommand(model="org/tiny-fish"), there).model.commit == NEWER
    assert plan_layout(PlaceCommand(model=f"org/tiny-fish@{COMMIT}"), there).model.commit == COMMIT
    assert plan_layout(PlaceCommand(model="org/tiny-fish@v1"), there).model.commit == COMMIT
    with pytest.raises(NotFound):
        plan_layout(PlaceCommand(model="org/tiny-fish@v2"), there)


def test_a_model_without_a_shape_is_unsupported_with_the_reason() -> None:
    with pytest.raises(Unsupported, match=r"it has no config\.json"):
        plan_layout(
            PlaceCommand(model="org/tiny-fish"),
            world({"a": 1000}, [held(shape=None, shape_error="it has no config.json")]),
        )


def test_a_node_that_read_the_shape_outranks_one_that_could_not() -> None:
    models = [held("a", shape=None, shape_error="unreadable", ready_at_s=9.0), held("b")]
    assert plan_layout(PlaceCommand(model="org/tiny-fish"), world({"a": 1000, "b": 1000}, models)).shape == SHAPE


@pytest.mark.parametrize("model", ["", "tiny-fish", "../../etc", "org/..", "org/name@../x"])
def test_I10_a_hostile_model_is_refused(model: str) -> None:
    with pytest.raises(BadName):
        plan_layout(PlaceCommand(model=model), world({"a": 1000}, [held()]))


# What it needs


@pytest.mark.parametrize(("asked", "kept"), [(0, 4096), (1, 1), (8192, 8192), (32768, 32768)])
def test_context_is_what_was_asked_else_the_models_at_most_4096(asked: int, kept: int) -> None:
    there = world({"a": 5000}, [held()])
    assert plan_layout(PlaceCommand(model="org/tiny-fish", context_tokens=asked), there).context_tokens == kept


@pytest.mark.parametrize("asked", [32769, -1])
def test_a_context_the_model_does_not_have_is_refused(asked: int) -> None:
    with pytest.raises(BadInput, match="context"):
        plan_layout(PlaceCommand(model="org/tiny-fish", context_tokens=asked), world({"a": 5000}, [held()]))


@pytest.mark.parametrize(("least", "most"), [(0, 4), (-1, 4), (3, 2), (1, 0)])
def test_node_counts_that_leave_nothing_to_choose_are_refused(least: int, most: int) -> None:
    with pytest.raises(BadInput, match="min_nodes"):
        plan_layout(
            PlaceCommand(model="org/tiny-fish", min_nodes=least, max_nodes=most), world({"a": 5000}, [held()])
        )


def test_only_the_named_nodes_are_used_and_unknown_ones_refused() -> None:
    there = world({"a": 5000, "b": 1000}, [held("a")])
    assert [s.node for s in plan_layout(PlaceCommand(model="org/tiny-fish", nodes=["b"]), there).layout.slices] == [
        "b"
    ]
    with pytest.raises(NotFound, match="c, d"):
        plan_layout(PlaceCommand(model="org/tiny-fish", nodes=["d", "b", "c"]), there)


def test_a_refusal_lists_every_nodes_figures_and_what_to_do() -> None:
    with pytest.raises(NoMemory) as refusal:
        plan_layout(PlaceCommand(model="org/tiny-fish"), world({"a": 300, "b": 150}, [held()]))
    error = refusal.value
    assert "\n" not in error.message and "does not fit" in error.message
    assert "shoal ps" in error.message  # what to do
    assert error.details["needed_bytes"] == WHOLE_BYTES
    one_layer_bytes = 100 * MIB + KV_BYTES + STAGE_OVERHEAD_BYTES
    assert error.details["nodes"] == [
        {
            "node": n,
            "needed_bytes": one_layer_bytes,
            "available_bytes": m * MIB,
            "tight_bytes": 2 * m * MIB - 2 * m * MIB // 10,
            "total_bytes": 2 * m * MIB,
        }
        for n, m in (("a", 300), ("b", 150))
    ]


def test_a_refusal_for_too_few_nodes_or_layers_names_the_limit() -> None:
    with pytest.raises(NoMemory, match="needs 2 nodes; 1 available"):
        plan_layout(PlaceCommand(model="org/tiny-fish", min_nodes=2), world({"a": 5000}, [held()]))
    five = dict.fromkeys("abcde", 5000)
    with pytest.raises(NoMemory, match="needs 5 nodes; the model has only 4 layers"):
        plan_layout(PlaceCommand(model="org/tiny-fish", min_nodes=5), world(five, [held()]))


# What is reserved already


def test_a_placement_reserves_memory_stage_by_stage() -> None:
    spec = InstanceSpec(
        id="i",
        repo="org/tiny-fish",
        commit=COMMIT,
        context_tokens=4096,
        stages=[
            StageSpec(rank=0, node="a", first_layer=0, last_layer=1),
            StageSpec(rank=1, node="b", first_layer=1, last_layer=4),
        ],
    )
    one = 100 * MIB + KV_BYTES
    assert reserved(world({}, [held("dead")], [spec])) == {
        "a": STAGE_OVERHEAD_BYTES + one + 50 * MIB,
        "b": STAGE_OVERHEAD_BYTES + 3 * one + 60 * MIB,
    }


def test_a_tied_head_on_a_single_stage_is_reserved_once() -> None:
    tied = ModelShape(**{**{f: getattr(SHAPE, f) for f in SHAPE.__struct_fields__}, "tied": True})
    there = world({"a": 5000}, [held(shape=tied)])
    found = plan_layout(PlaceCommand(model="org/tiny-fish"), there)
    spec = to_instance_spec(found, "i", 0.0)
    assert reserved(world({"a": 5000}, [held(shape=tied)], [spec])) == {"a": found.layout.slices[0].bytes}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 2000), min_size=1),
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0, 300, 8192])), max_size=12),
    st.booleans(),
)
def test_however_many_are_placed_no_memory_is_reserved_twice(
    memory_mib: dict[str, int], requests: list[tuple[int, int]], tied: bool
) -> None:
    shape = ModelShape(**{**{f: getattr(SHAPE, f) for f in SHAPE.__struct_fields__}, "tied": tied})
    models = [held("store", shape=shape)]
    placed: list[InstanceSpec] = []
    for number, (min_nodes, context_tokens) in enumerate(requests):
        there = world(memory_mib, models, placed, alive=["store"])
        request = PlaceCommand(model="org/tiny-fish", min_nodes=min_nodes, context_tokens=context_tokens)
        before = reserved(there)
        try:
            found = plan_layout(request, there)
        except NoMemory:
            continue
        placed.append(to_instance_spec(found, f"i-{number}", 0.0))
        after = reserved(world(memory_mib, models, placed, alive=["store"]))
        # A stage's reservation is what counts for it from then on.
        for stage in found.layout.slices:
            assert after[stage.node] - before.get(stage.node, 0) == stage.bytes
        assert all(after[n] <= memory_mib[n] * MIB for n in after)


# Its id


@given(st.text("abcXYZ019._-", min_size=1, max_size=96), st.text(max_size=30))
def test_I10_an_instances_id_is_readable_safe_and_repeatable(name: str, command: str) -> None:
    identity = instance_id(f"org/{name}", command)
    assert check_id(identity) == identity == instance_id(f"org/{name}", command)
    assert identity != instance_id(f"org/{name}", f"{command}x")


def test_an_instance_is_called_after_its_model() -> None:
    assert instance_id("shoal/tiny-fish", "c1").startswith("tiny-fish-")


# Its state

SPEC = InstanceSpec(
    id="i",
    repo="org/tiny-fish",
    commit=COMMIT,
    context_tokens=4096,
    epoch=2,
    stages=[
        StageSpec(rank=0, node="a", first_layer=0, last_layer=2),
        StageSpec(rank=1, node="b", first_layer=2, last_layer=4),
    ],
)


def stage(rank: int, phase: Any, epoch: int = 2, **more: Any) -> StageState:
    return StageState(instance="i", rank=rank, node="ab"[rank], epoch=epoch, phase=phase, **more)


def status_of(*stages: StageState, live: str = "ab", before: InstanceState | None = None) -> InstanceState:
    return instance_status(SPEC, stages, list(live), before)


READY = status_of(stage(0, "ready"), stage(1, "ready"))
LOST = ErrorBody(code="failed", message="out of memory on b")


def test_an_instance_starts_until_every_stage_of_its_epoch_runs() -> None:
    assert status_of().phase == "starting"
    assert status_of(stage(0, "ready"), stage(1, "loading")).phase == "starting"
    assert status_of(stage(0, "ready"), stage(1, "ready", epoch=1)).phase == "starting"
    assert READY.phase == "ready"
    assert (READY.nodes, READY.epoch, READY.error) == (["a", "b"], 2, None)


def test_a_model_that_no_longer_loads_fails_its_instance() -> None:
    error = LoadError("cannot load the tokenizer: tokenizer.json holds a list, not an object").body()
    now = status_of(stage(0, "ready"), stage(1, "failed", error=error), before=READY)
    assert (now.phase, now.error) == ("failed", error)


def test_a_ready_instance_is_degraded_while_a_stage_is_lost() -> None:
    both = (stage(0, "ready"), stage(1, "ready"))
    degraded = status_of(*both, live="a", before=READY)
    assert degraded.phase == "degraded"
    assert status_of(stage(0, "ready"), before=READY).phase == "degraded"
    assert status_of(stage(0, "ready"), stage(1, "linking"), before=READY).phase == "degraded"
    assert status_of(*both, before=degraded).phase == "ready"


def test_an_instance_that_lacks_a_node_names_it_and_since_when() -> None:
    stages, since_s = (stage(0, "linking"), stage(1, "ready")), {"b": 86400.0}
    for before, phase in ((READY, "degraded"), (None, "starting")):
        now = instance_status(SPEC, stages, ["a"], before, None, since_s)
        assert now.phase == phase and now.error is not None
        assert now.error.message == "node b is down since 1970-01-02T00:00:00+00:00"
        assert now.error.details == {"down_since_s": {"b": 86400.0}}
        no_memory = NoMemory("it needs 2 GB", tier="tight").body()
        stays = instance_status(SPEC, stages, ["a"], before, no_memory, since_s)
        assert stays.error is not None and stays.error.code == NoMemory.code
        assert "node b is down since 1970" in stays.error.message and "it needs 2 GB" in stays.error.message
    unknown = status_of(*stages, live="a", before=READY).error
    assert unknown is not None and unknown.message == "node b is down"


def test_an_instance_whose_stage_fails_has_its_message() -> None:
    failed = status_of(stage(0, "ready"), stage(1, "failed", error=LOST))
    assert (failed.phase, failed.error) == ("failed", LOST)
    assert status_of(stage(0, "ready"), stage(1, "failed", error=LOST), before=READY).error == LOST
    assert status_of(stage(0, "ready"), stage(1, "ready"), before=failed) == READY


def test_a_forced_instance_killed_for_memory_has_failed() -> None:
    error = NoMemory("it was forced onto this node").body()
    failed = status_of(stage(0, "ready"), stage(1, "failed", error=error), before=READY)
    assert (failed.phase, failed.error) == ("failed", error)


def test_stages_of_other_instances_do_not_count() -> None:
    strangers = [StageState(instance="j", rank=r, node="ab"[r], epoch=2, phase="ready") for r in (0, 1)]
    assert status_of(*strangers).phase == "starting"


@given(st.permutations([stage(0, "ready"), stage(1, "ready"), stage(1, "ready", epoch=1)]))
def test_an_instances_status_does_not_depend_on_the_news_order(news: list[StageState]) -> None:
    assert status_of(*news) == READY
