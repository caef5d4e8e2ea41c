"""Which instances have to move, and the settings that say when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import BadInput
from shoal_common.messages.instances import InstanceSpec, PlacementConstraints, StageSpec
from shoal_common.settings.values import read_settings
from shoal_placement.leader.migration_plan import plan_migrations
from shoal_placement.settings import PlacementSettings
from tests.placement.unit.test_cluster_facts import COMMIT

AFTER_S = 60.0
names = st.sampled_from("abcd")


def runs(identity: str, *nodes: str, asked: PlacementConstraints | None = None) -> InstanceSpec:
    """Return an instance of the four-layer model with its layers spread over these nodes."""
    bounds = [round(4 * i / len(nodes)) for i in range(len(nodes) + 1)]
    stages = [StageSpec(rank=r, node=n, first_layer=bounds[r], last_layer=bounds[r + 1]) for r, n in enumerate(nodes)]
    return InstanceSpec(
        id=identity,
        repo="org/tiny-fish",
        commit=COMMIT,
        stages=stages,
        context_tokens=300,
        epoch=4,
        created_at_s=1.0,
        constraints=asked or PlacementConstraints(),
    )


def test_a_node_down_for_a_moment_is_waited_for_and_then_left() -> None:
    now = plan_migrations([runs("i", "a", "b")], {"b": 20.0}, set(), AFTER_S)
    assert now.leaving == [] and now.wake_s == 40.0
    now = plan_migrations([runs("i", "a", "b"), runs("j", "a")], {"b": 60.0}, set(), AFTER_S)
    assert [(m.spec.id, m.down, m.drained) for m in now.leaving] == [("i", ["b"], [])]
    assert now.leaving[0].reason == "b is down"


def test_a_drained_node_is_left_at_once() -> None:
    now = plan_migrations([runs("i", "a", "b")], {"b": 1.0}, {"b"}, AFTER_S)
    assert [(m.spec.id, m.down, m.drained) for m in now.leaving] == [("i", [], ["b"])]


@given(
    st.lists(st.lists(names, min_size=1, max_size=3, unique=True), max_size=5),
    st.dictionaries(names, st.floats(0, 200)),
    st.sets(names),
)
def test_instances_on_live_undrained_nodes_never_migrate(
    placed: list[list[str]], gone_s: dict[str, float], drained: set[str]
) -> None:
    specs = [runs(f"i{n}", *nodes) for n, nodes in enumerate(placed)]
    now = plan_migrations(specs, gone_s, drained, AFTER_S)
    leaving = {m.spec.id for m in now.leaving}
    for number, nodes in enumerate(placed):
        has_to = any(n in drained or gone_s.get(n, 0.0) >= AFTER_S for n in nodes)
        assert (f"i{number}" in leaving) == has_to
    assert now.wake_s is None or 0 < now.wake_s <= AFTER_S


def test_settings_are_durations_and_the_environment_wins() -> None:
    def read(section: dict[str, object], **environ: str) -> PlacementSettings:
        return read_settings(PlacementSettings, {"placement": section}, environ)

    assert read({}) == PlacementSettings(86400.0, 60.0)
    assert read({"retire_after": "36h", "replace_after": "5min"}) == PlacementSettings(36 * 3600, 300)
    assert read({"retire_after": "36h"}, SHOAL_RETIRE_AFTER="7d") == PlacementSettings(7 * 86400, 60)
    for wrong in ("0s", "-1h", "soon", "1.5h", "h", "٣h", "9999999999s"):
        with pytest.raises(BadInput, match="retire_after"):
            read({"retire_after": wrong})
        with pytest.raises(BadInput, match="replace_after"):
            read({"replace_after": wrong})
