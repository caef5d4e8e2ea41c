"""The layout problem built from a model's need and the nodes' memory, and its solution."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_placement.solver import Layout, ModelNeed, NodeCapacity, build_problem, slice_bytes, solve_balanced

SIZES = st.integers(1, 30)


@st.composite
def needs(draw: st.DrawFn, most_layers: int = 6) -> ModelNeed:
    embed = draw(st.integers(0, 20))
    tied = draw(st.booleans())
    return ModelNeed(
        layer_bytes=draw(st.lists(SIZES, min_size=1, max_size=most_layers)),
        embed_bytes=embed,
        head_bytes=draw(st.integers(0, 20)) + (embed if tied else 0),
        tied=tied,
        stage_bytes=draw(st.integers(0, 5)),
    )


@st.composite
def node_capacities(draw: st.DrawFn, most: int = 4, least: int = 1) -> list[NodeCapacity]:
    count = draw(st.integers(least, most))
    return [NodeCapacity(f"node-{i}", draw(st.integers(-5, 120)), draw(st.booleans())) for i in range(count)]


def solve(need: ModelNeed, cluster: list[NodeCapacity], min_nodes: int, max_nodes: int) -> Layout | None:
    return solve_balanced(build_problem(need, cluster, min_nodes, max_nodes))


def check(need: ModelNeed, order: Sequence[NodeCapacity], layout: Layout) -> None:
    """Check that each layer is covered once and in order, each stage has at least one, and every stage fits."""
    by_node = {r.node: r for r in order}
    assert [s.first for s in layout.slices] == [0, *(s.last for s in layout.slices[:-1])]
    assert layout.slices[-1].last == len(need.layer_bytes)
    assert len({s.node for s in layout.slices}) == len(layout.slices)
    for s in layout.slices:
        assert s.first < s.last
        assert s.bytes == slice_bytes(need, s.first, s.last) <= by_node[s.node].free_bytes
    assert layout.max_memory_share == max(s.bytes / by_node[s.node].free_bytes for s in layout.slices) <= 1


@settings(max_examples=200, deadline=None)
@given(needs(), node_capacities(), st.integers(1, 4), st.integers(1, 5))
def test_what_is_placed_fits(need: ModelNeed, cluster: list[NodeCapacity], min_nodes: int, max_nodes: int) -> None:
    layout = solve(need, cluster, min_nodes, max_nodes)
    if layout is not None:
        assert min_nodes <= len(layout.slices) <= max_nodes
        check(need, cluster, layout)


def plain(model: int, layers: int) -> ModelNeed:
    """Return a model without embedding, head or overhead, in units that divide evenly."""
    assert model * 100 % layers == 0
    return ModelNeed(layer_bytes=[model * 100 // layers] * layers)


def counts(memory: Sequence[int], model: int, layers: int, min_nodes: int = 1) -> list[int] | None:
    """Return layers by node, in the order of `memory`, which is in the unit of `model`; None if refused."""
    cluster = [NodeCapacity(f"node-{i}", m * 100) for i, m in enumerate(memory)]
    layout = solve(plain(model, layers), cluster, min_nodes, 16)
    if layout is None:
        return None
    given_layers = {s.node: s.last - s.first for s in layout.slices}
    return [given_layers.get(r.node, 0) for r in cluster]


@pytest.mark.parametrize(
    ("memory", "layers", "expected"),
    [((500, 500, 1000), 12, [3, 3, 6]), ((500, 500, 500), 12, [4, 4, 4]), ((312, 518, 1024), 12, [2, 3, 7])],
)
def test_the_published_splits_hold_when_all_nodes_are_asked_for(
    memory: tuple[int, ...], layers: int, expected: list[int]
) -> None:
    # On equally fast nodes all splits cost the same: the one that leaves the fullest node emptiest is returned.
    twelfths = [m * 12 for m in memory]  # so that a layer is a whole number
    assert counts(twelfths, 1000 * 12, layers, min_nodes=3) == expected


def test_fewer_nodes_beat_the_published_splits_where_they_do() -> None:
    # Published are (3, 3, 6) and (2, 3, 7), for a rule that takes all nodes; each link costs time, so one node is
    # better. For (500, 500, 500) it is two, which hold the model exactly.
    assert counts([500 * 12, 500 * 12, 1000 * 12], 1000 * 12, 12) == [0, 0, 12]
    assert counts([312 * 12, 518 * 12, 1024 * 12], 1000 * 12, 12) == [0, 0, 12]
    two = counts([500 * 12, 500 * 12, 500 * 12], 1000 * 12, 12)
    assert two is not None and sorted(two) == [0, 6, 6]


def test_a_model_that_fits_exactly_is_placed_and_a_byte_more_not() -> None:
    assert counts([1000], 1000, 1) == [1]
    assert counts([1000], 1001, 1) is None


def test_memory_that_is_short_in_sum_is_refused() -> None:
    assert counts([900, 50, 10], 1000, 20) is None


def test_two_layers_of_191_16ths_do_not_fit_22_and_one_does() -> None:
    # Published as refused by a rule by shares, and as fitting as (2, 14). A layer is 191 / 16 = 11.94: two are 23.9
    # of 22, and all sixteen are 191 of 180, so one layer and fifteen (179.1) are all there is.
    assert counts([22 * 16, 180 * 16], 191 * 16, 16) == [1, 15]
    assert counts([22 * 16, 179 * 16], 191 * 16, 16) is None


def test_two_layers_of_11_fit_22_exactly_if_nothing_else_does() -> None:
    # (2, 14) fits where a layer is rounded down to 11: 22 of 22 and 154 of 180. So does (1, 15), which leaves the
    # fullest node emptier; and the large one holds all of it by itself, without a link.
    assert counts([22, 180], 16 * 11, 16) == [0, 16]
    assert counts([22, 180], 16 * 11, 16, min_nodes=2) == [1, 15]
    assert counts([22, 14 * 11], 16 * 11, 16) == [2, 14]


def test_a_faster_node_is_taken_though_another_has_more_memory() -> None:
    need, large = plain(1000, 10), NodeCapacity("large", 400_000)
    layout = solve(need, [large, NodeCapacity("fast", 100_000, s_per_byte=large.s_per_byte / 2)], 1, 16)
    assert layout is not None
    assert [s.node for s in layout.slices] == ["fast"]


def test_a_node_that_holds_the_model_is_taken_even_if_smaller() -> None:
    layout = solve(plain(1000, 10), [NodeCapacity("big", 200_000), NodeCapacity("holder", 100_000, True)], 1, 16)
    assert layout is not None
    assert [s.node for s in layout.slices] == ["holder"]


def test_a_node_that_is_much_faster_is_worth_a_download() -> None:
    holder = NodeCapacity("holder", 100_000, True)
    layout = solve(plain(1000, 10), [NodeCapacity("fast", 100_000, s_per_byte=holder.s_per_byte / 2), holder], 1, 16)
    assert layout is not None
    assert [s.node for s in layout.slices] == ["fast"]


def test_a_holder_too_small_alone_is_used_beside_the_largest() -> None:
    cluster = [NodeCapacity("a", 80_000), NodeCapacity("b", 60_000), NodeCapacity("holder", 50_000, True)]
    layout = solve(plain(1000, 10), cluster, 2, 16)
    assert layout is not None
    assert {s.node for s in layout.slices} == {"a", "holder"}


def test_a_tied_head_counts_once_where_the_embedding_is() -> None:
    need = ModelNeed(layer_bytes=[10, 10], embed_bytes=100, head_bytes=105, tied=True)
    assert slice_bytes(need, 0, 2) == 20 + 105
    assert (slice_bytes(need, 0, 1), slice_bytes(need, 1, 2)) == (10 + 100, 10 + 105)
    assert solve(need, [NodeCapacity("a", 125)], 1, 1) is not None
    assert (
        solve(ModelNeed(layer_bytes=[10, 10], embed_bytes=100, head_bytes=105), [NodeCapacity("a", 125)], 1, 1)
        is None
    )


def test_no_more_stages_than_layers() -> None:
    assert solve(plain(100, 2), [NodeCapacity(f"n{i}", 10**6) for i in range(5)], 3, 16) is None


def test_a_large_cluster_is_solved() -> None:
    chance = random.Random(7)
    cluster = [NodeCapacity(f"node-{i}", chance.randrange(4, 64) << 30, chance.random() < 0.1) for i in range(1000)]
    need = ModelNeed(layer_bytes=[5 << 30] * 80, embed_bytes=2 << 30, head_bytes=2 << 30, stage_bytes=96 << 20)
    layout = solve(need, cluster, 1, 16)
    assert layout is not None
    check(need, cluster, layout)
