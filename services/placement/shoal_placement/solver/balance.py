"""Of the splits over an order with about the same cost, the one that leaves the fullest node emptiest."""

from __future__ import annotations

import numpy as np

from shoal_placement.solver.cost import Chain, Floats, Ints, keeps, layout_of
from shoal_placement.solver.problem import Layout, Problem

WORTH = 1e-3
"""Share of the cost that is given up for free memory: times are not measured any better than this."""
_ROUNDS = 30


def emptiest(problem: Problem, layout: Layout) -> Layout:
    """Return the split over the same order that leaves the fullest node emptiest, at most `WORTH` dearer."""
    if len(layout.slices) < 2 or problem.counts or problem.max_fetch_bytes is not None:
        return layout
    index = {n.name: i for i, n in enumerate(problem.nodes)}
    order = [index[s.node] for s in layout.slices]
    all_nodes = Chain(problem, problem.nodes)
    chain = all_nodes.part(order)
    max_cost_s = layout.cost_s * (1 + WORTH)
    slowest_s = max_cost_s / chain.in_flight(len(order))
    low, high, best = 0.0, layout.fullest, layout
    for _ in range(_ROUNDS):
        share = (low + high) / 2
        cuts = cheapest_cuts(chain, _reach(chain, share, slowest_s))
        candidate = None if cuts is None else layout_of(problem, order, cuts, all_nodes)
        if candidate is None or candidate.cost_s > max_cost_s or not keeps(problem, candidate):
            low = share
        else:
            best, high = candidate, min(share, candidate.fullest)
    return best


def _reach(chain: Chain, share: float, slowest_s: float) -> Ints:
    capacity = (chain.free * share).astype(np.int64)[:, None] - chain.problem.stage_bytes
    end = np.searchsorted(chain.bytes, (chain.bytes + capacity).ravel(), side="right") - 1
    first = np.arange(chain.layers + 1)
    memory_reach: Ints = np.maximum(end.reshape(-1, chain.layers + 1), first)
    return np.minimum(memory_reach, chain.reach(slowest_s))


def cheapest_cuts(chain: Chain, reach: Ints) -> list[int] | None:
    """Return the cuts of the layers over the chain's nodes, in their order, with the least cost within their reach.

    None if there are no such cuts.
    """
    layers = chain.layers
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
