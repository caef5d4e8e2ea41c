"""The gossip graph: the same on all nodes, connected, bounded, and stable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_fetcher.swarm.overlay import MAX_FULL_MESH_NODES, RINGS, neighbours

NAMES = st.text("abcdefgh0123456789-", min_size=1, max_size=6)
CLUSTERS = st.one_of(
    st.sets(NAMES, min_size=2, max_size=20),
    st.builds(lambda name, count: {f"{name}{n}" for n in range(count)}, NAMES, st.integers(17, 60)),
)
BLOBS = st.sampled_from(["a" * 64, "b" * 64])


def graph(nodes: set[str], blob: str) -> dict[str, set[str]]:
    return {node: neighbours(node, nodes, blob) for node in nodes}


@given(CLUSTERS, BLOBS)
def test_the_overlay_is_symmetric_and_connected(nodes: set[str], blob: str) -> None:
    edges = graph(nodes, blob)
    assert all(node in edges[other] and other != node for node, others in edges.items() for other in others)
    reached, new = set[str](), {min(nodes)}
    while new:
        reached |= new
        new = set[str]().union(*(edges[node] for node in new)) - reached
    assert reached == nodes


@given(CLUSTERS, BLOBS)
def test_up_to_16_nodes_all_are_neighbours_and_above_at_most_ten(nodes: set[str], blob: str) -> None:
    for node, others in graph(nodes, blob).items():
        if len(nodes) <= MAX_FULL_MESH_NODES:
            assert others == nodes - {node}
        else:
            assert 2 <= len(others) <= 2 * RINGS


@given(NAMES, st.integers(17, 60), BLOBS)
def test_a_node_that_comes_changes_few_edges(name: str, count: int, blob: str) -> None:
    def edges_of(cluster: set[str]) -> set[frozenset[str]]:
        return {frozenset((a, b)) for a, others in graph(cluster, blob).items() for b in others}

    nodes = {f"{name}{n}" for n in range(count)}
    assert len(edges_of(nodes) ^ edges_of(nodes | {"new"})) <= 3 * RINGS


@given(CLUSTERS, BLOBS)
def test_the_overlay_ignores_our_own_node_in_the_list(nodes: set[str], blob: str) -> None:
    me = min(nodes)
    assert neighbours(me, nodes, blob) == neighbours(me, nodes - {me}, blob)


@pytest.mark.parametrize("count", [40, 100, 400])
def test_large_clusters_have_few_neighbours_and_short_paths(count: int) -> None:
    edges = graph({f"node-{n}" for n in range(count)}, "a" * 64)
    degrees = [len(others) for others in edges.values()]
    assert sum(degrees) / count >= 8 and max(degrees) <= 10
    reached, steps = {"node-0"}, 0
    while len(reached) < count:
        reached |= set[str]().union(*(edges[node] for node in reached))
        steps += 1
    assert steps <= 5
