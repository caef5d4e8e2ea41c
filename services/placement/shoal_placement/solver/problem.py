"""The layout problem in plain numbers, and its answer.

Choose nodes, their order and a range of consecutive layers for each, so that every stage fits its node's memory and

    max(T, C * B)

is least. T: seconds one token takes through all stages, the links between them and the way back. B: seconds of the
slowest stage, its links not included (they carry one token while the next is computed). C: requests in flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

LinkTable = Sequence[Sequence[float]] | NDArray[np.float64]
"""A table of seconds from node to node; empty for none."""
IN_FLIGHT_PER_STAGE = 0
"""As many requests in flight as there are stages, the fewest that keep every stage busy. This is `balanced`."""


class Node(msgspec.Struct, frozen=True):
    """A node that may take layers."""

    name: str
    free_bytes: int
    s_per_work: float = 0.0
    """Seconds for one unit of a layer's work (t_i)."""
    fetch_bytes: Sequence[int] = ()
    """Bytes it would have to download of each layer; empty: none."""
    fetch_embed_bytes: int = 0
    fetch_head_bytes: int = 0
    price_s_per_byte: float = 0.0
    """Seconds a token may take longer to save a byte of memory here: tiny, so it only decides between equal costs."""


class Problem(msgspec.Struct, frozen=True):
    """A model, the nodes it may run on, and the constraints. Bytes of a layer include its cache."""

    nodes: Sequence[Node]
    layer_bytes: Sequence[int]
    layer_work: Sequence[float] = ()
    """Of each layer, above 0, in the unit of `Node.s_per_work`; empty: 1 for each."""
    embed_bytes: int = 0
    embed_work: float = 0.0
    head_bytes: int = 0
    """Includes a tied embedding: a stage that has both ends holds it once."""
    head_work: float = 0.0
    tied: bool = False
    stage_bytes: int = 0
    """Bytes that every stage takes besides its layers."""
    link_s: LinkTable = ()
    """Seconds to send a hidden state (or, on the way back, a token) from node to node; empty: none."""
    in_flight: int = 1
    """C; 1 is `latency`, AS_STAGES `balanced`, any other number `throughput`."""
    min_nodes: int = 1
    max_nodes: int = 16
    layer_counts: Mapping[str, int] = {}
    """Exact numbers of layers that these nodes have to take."""
    max_fetch_bytes: int | None = None
    fetch_price_s_per_byte: float = 0.0
    """Seconds a token may take longer to save a byte of download. It is added to T, so the search stays exact."""


class StageSlice(msgspec.Struct, frozen=True):
    """Layers [first, last) on a node, and the bytes they take there."""

    node: str
    first: int
    last: int
    bytes: int


class Layout(msgspec.Struct, frozen=True):
    """Stages in order, and their cost."""

    slices: list[StageSlice]
    latency_s: float
    """T: one token, once around, without prices."""
    bottleneck_s: float
    """B: the slowest stage."""
    fetch_bytes: int
    max_memory_share: float
    """The largest share of a node's free memory that a stage takes: at most 1."""
    cost_s: float
    """max(T + prices, C * B): the minimized cost."""


class Solution(msgspec.Struct, frozen=True):
    """The best layout that was found. `layout` is None and `proved` True: there is none."""

    layout: Layout | None
    lower_bound_s: float
    """No layout costs less."""
    proved: bool
    """Whether the layout is known to be the best, or it is known that there is none."""

    @property
    def cost_over_bound(self) -> float:
        """The cost over its lower bound: no layout is better by more than this ratio; 1 if it is proved."""
        if self.layout is None or self.layout.cost_s <= self.lower_bound_s:
            return 1.0
        return self.layout.cost_s / self.lower_bound_s if self.lower_bound_s > 0 else float("inf")
