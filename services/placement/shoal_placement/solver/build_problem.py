"""Builds the layout problem from a model's need and the memory budgets of the nodes."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from shoal_placement.solver.balance import rebalance_fullest_node
from shoal_placement.solver.best_layout import solve
from shoal_placement.solver.problem import Layout, LinkTable, Node, Problem

DEFAULT_BANDWIDTH_BYTES_PER_S = 100e9
"""Memory bandwidth of a node that has not measured it: that of a machine with two channels of DDR5."""
DEFAULT_S_PER_BYTE = 1 / DEFAULT_BANDWIDTH_BYTES_PER_S
DEFAULT_LINK_S = 1e-3
"""Seconds to send a hidden state over an unknown link: a wired network's."""
FETCH_PRICE_SHARE = 0.02
"""A layout that downloads nothing may be slower by this share than one that downloads all of the model: a token's
time is not known better, and a download takes minutes."""
MEMORY_PRICE_SHARE = 1e-4
"""The same share between a node with little and one with plenty of free memory; it only decides between equals."""


class ModelNeed(msgspec.Struct, frozen=True):
    """The bytes that each piece of a model takes; a layer includes its cache for the requested context."""

    layer_bytes: list[int]
    embed_bytes: int = 0
    """On the first stage."""
    head_bytes: int = 0
    """On the last stage; includes the embedding's bytes if tied."""
    tied: bool = False
    stage_bytes: int = 0
    """What every stage takes besides its layers."""
    weight_bytes: Sequence[int] = ()
    """Of each layer, without its cache: what is downloaded. Empty: `layer_bytes`."""
    layer_work_bytes: Sequence[int] = ()
    """Of each layer, what is read for a token. Empty: `layer_bytes`."""


class NodeCapacity(msgspec.Struct, frozen=True):
    """A node that may take layers, and its memory budget for them."""

    node: str
    free_bytes: int
    has_model: bool = False
    """Whether the model is on its disk already."""
    s_per_byte: float = DEFAULT_S_PER_BYTE
    """Seconds to read a byte of its memory: a layer is read once for each token."""
    missing_shares: Sequence[float] = ()
    """Of each layer, the share that is not on its disk; empty: all of it, or none if it `holds` the model."""


def build_problem(
    need: ModelNeed,
    capacities: Sequence[NodeCapacity],
    min_nodes: int,
    max_nodes: int,
    link_s: LinkTable = (),
    in_flight: int = 1,
) -> Problem:
    """Return the layout problem. A layer's work is what is read for a token; unknown links take `DEFAULT_LINK_S`."""
    count, weights = len(need.layer_bytes), need.weight_bytes or need.layer_bytes
    model_bytes = max(sum(need.layer_bytes) + need.embed_bytes + need.head_bytes, 1)
    fastest = min((r.s_per_byte for r in capacities), default=DEFAULT_S_PER_BYTE)
    nodes = [
        Node(
            name=r.node,
            free_bytes=r.free_bytes,
            s_per_work=r.s_per_byte,
            fetch_bytes=[round(b * lack) for b, lack in zip(weights, _lacks(r, count), strict=True)],
            fetch_embed_bytes=round(need.embed_bytes * _lacks(r, count)[0]),
            fetch_head_bytes=round(need.head_bytes * _lacks(r, count)[-1]),
            price_s_per_byte=MEMORY_PRICE_SHARE * fastest * model_bytes / (model_bytes + max(r.free_bytes, 0)),
        )
        for r in capacities
    ]
    work = need.layer_work_bytes or need.layer_bytes
    return Problem(
        nodes=nodes,
        layer_bytes=need.layer_bytes,
        layer_work=[float(max(b, 1)) for b in work],
        embed_bytes=need.embed_bytes,
        head_bytes=need.head_bytes,
        head_work=float(need.head_bytes),
        tied=need.tied,
        stage_bytes=need.stage_bytes,
        link_s=link_s if len(link_s) else np.where(np.eye(len(capacities), dtype=bool), 0.0, DEFAULT_LINK_S),
        in_flight=in_flight,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        fetch_price_s_per_byte=FETCH_PRICE_SHARE * fastest,
    )


def solve_balanced(problem: Problem) -> Layout | None:
    """Return the best layout, split to leave the fullest node emptiest; None if none fits."""
    answer = solve(problem)
    return None if answer.layout is None else rebalance_fullest_node(problem, answer.layout)


def _lacks(capacity: NodeCapacity, count: int) -> Sequence[float]:
    return capacity.missing_shares or [0.0 if capacity.has_model else 1.0] * count


def slice_bytes(need: ModelNeed, first: int, last: int) -> int:
    """Return the bytes of the stage with layers [first, last)."""
    is_first, is_last = first == 0, last == len(need.layer_bytes)
    ends_bytes = (need.embed_bytes if is_first else 0) + (need.head_bytes if is_last else 0)
    ends_bytes -= need.embed_bytes if need.tied and is_first and is_last else 0
    return need.stage_bytes + sum(need.layer_bytes[first:last]) + ends_bytes
