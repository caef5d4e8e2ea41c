"""Of the splits over an order with about the same cost, the one that leaves the fullest node emptiest."""

from __future__ import annotations

import numpy as np

from shoal_placement.solver.cost import CostModel, Floats, Ints, make_layout, meets_constraints
from shoal_placement.solver.problem import Layout, Problem

BALANCE_MAX_EXTRA_COST = 1e-3
"""Share of the cost that is given up for free memory: times are not measured any better than this."""
_ROUNDS = 30


def rebalance_fullest_node(problem: Problem, layout: Layout) -> Layout:
    """Return the split over the same order that leaves the fullest node the most memory, hardly dearer."""
    if len(layout.slices) < 2 or problem.layer_counts or problem.max_fetch_bytes is not None:
        return layout
    index = {n.name: i for i, n in enumerate(problem.nodes)}
    order = [index[s.node] for s in layout.slices]
    all_nodes = CostModel(problem, problem.nodes)
    chain = all_nodes.for_nodes(order)
    max_cost_s = layout.cost_s * (1 + BALANCE_MAX_EXTRA_COST)
    slowest_s = max_cost_s / chain.in_flight(len(order))
    low, high, best = 0.0, layout.max_memory_share, layout
    for _ in range(_ROUNDS):
        share = (low + high) / 2
        cuts = cheapest_cuts(chain, _reach(chain, share, slowest_s))
        candidate = None if cuts is None else make_layout(problem, order, cuts, all_nodes)
        if candidate is None or candidate.cost_s > max_cost_s or not meets_constraints(problem, candidate):
            low = share
        else:
            best, high = candidate, min(share, candidate.max_memory_share)
    return best


def _reach(chain: CostModel, share: float, slowest_s: float) -> Ints:
    capacity = (chain.free_bytes * share).astype(np.int64)[:, None] - chain.problem.stage_bytes
    end = np.searchsorted(chain.bytes, (chain.bytes + capacity).ravel(), side="right") - 1
    first = np.arange(chain.layer_count + 1)
    memory_reach: Ints = np.maximum(end.reshape(-1, chain.layer_count + 1), first)
    return np.minimum(memory_reach, chain.reach(slowest_s))


def cheapest_cuts(chain: CostModel, reach: Ints) -> list[int] | None:
    """Return the cuts of the layers over the chain's nodes, in their order, with the least cost within their reach.

    None if there are no such cuts.
    """
    layers = chain.layer_count
    best: Floats = np.full(layers + 1, np.inf)
    best[0] = 0.0
    cuts: list[Ints] = []
    ends = np.arange(layers + 1)
    below = ends[None, :] < ends[:, None]
    for reached, cost in zip(reach, chain.cost, strict=True):
        # Rows: each end. Columns: each first layer.
        allowed = below & (reached >= ends[:, None])
        extended = np.where(allowed, best - cost, np.inf)
        cut = extended.argmin(axis=1)
        cuts.append(cut)
        best = extended[ends, cut] + cost
    if best[layers] == np.inf:
        return None
    backwards = [layers]
    for cut in reversed(cuts):
        backwards.append(int(cut[backwards[-1]]))
    return backwards[::-1]
