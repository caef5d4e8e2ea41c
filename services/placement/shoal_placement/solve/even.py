"""Of the splits over an order that cost about the same, the one that leaves the fullest node emptiest."""

from __future__ import annotations

import numpy as np

from shoal_placement.solve.cost import Chain, Floats, Ints, keeps, layout_of
from shoal_placement.solve.problem import Layout, Problem

WORTH = 1e-3
"""Times are measured, and not better than this: so much of the cost is given for memory that stays free."""
_ROUNDS = 30


def emptiest(problem: Problem, layout: Layout) -> Layout:
    """The same nodes in the same order, at most `WORTH` dearer, with the largest share of a node's memory least."""
    if len(layout.slices) < 2 or problem.counts or problem.max_fetch_bytes is not None:
        return layout
    place = {n.name: i for i, n in enumerate(problem.nodes)}
    order = [place[s.node] for s in layout.slices]
    whole = Chain(problem, problem.nodes)
    chain = whole.part(order)
    most_s = layout.cost_s * (1 + WORTH)
    slowest_s = most_s / chain.in_flight(len(order))
    low, high, best = 0.0, layout.fullest, layout
    for _ in range(_ROUNDS):
        share = (low + high) / 2
        cuts = cheapest_cuts(chain, _reach(chain, share, slowest_s))
        found = None if cuts is None else layout_of(problem, order, cuts, whole)
        if found is None or found.cost_s > most_s or not keeps(problem, found):
            low = share
        else:
            best, high = found, min(share, found.fullest)
    return best


def _reach(chain: Chain, share: float, slowest_s: float) -> Ints:
    room = (chain.free * share).astype(np.int64)[:, None] - chain.problem.stage_bytes
    far = np.searchsorted(chain.bytes, (chain.bytes + room).ravel(), side="right") - 1
    first = np.arange(chain.layers + 1)
    held: Ints = np.maximum(far.reshape(-1, chain.layers + 1), first)
    return np.minimum(held, chain.reach(slowest_s))


def cheapest_cuts(chain: Chain, reach: Ints) -> list[int] | None:
    """Where to cut the layers for the chain's nodes in their order, so that the stages' cost is least, each within
    its reach. None where there is no such split."""
    layers = chain.layers
    best: Floats = np.full(layers + 1, np.inf)
    best[0] = 0.0
    cuts: list[Ints] = []
    ends = np.arange(layers + 1)
    below = ends[None, :] < ends[:, None]
    for reached, cost in zip(reach, chain.cost, strict=True):
        # To each end (down) from each first layer (across).
        allowed = below & (reached >= ends[:, None])
        longer = np.where(allowed, best - cost, np.inf)
        cut = longer.argmin(axis=1)
        cuts.append(cut)
        best = longer[ends, cut] + cost
    if best[layers] == np.inf:
        return None
    found = [layers]
    for cut in reversed(cuts):
        found.append(int(cut[found[-1]]))
    return found[::-1]
