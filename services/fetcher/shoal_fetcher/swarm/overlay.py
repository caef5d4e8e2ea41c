"""Which nodes gossip about a blob: up to 16 all with all; above, a random graph that every node computes alike. Pure.

The graph is the union of five rings. Each ring has all nodes in another order, by a hash of the blob, the ring and
the node. So it is connected, no node has more than ten neighbours, distances are short, and a node that joins or
leaves changes three edges of each ring and nothing else. Different blobs have different graphs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection

MAX_FULL_MESH_NODES = 16
RINGS = 5


def neighbours(own_node: str, nodes: Collection[str], blob: str) -> set[str]:
    """Return the nodes that this node gossips with and asks, of those that fetch or have this blob."""
    others = set(nodes) - {own_node}
    if len(others) < MAX_FULL_MESH_NODES:
        return others
    chosen: set[str] = set()
    for ring in range(RINGS):
        positions = [(_place(blob, ring, node), node) for node in others]
        own_position = (_place(blob, ring, own_node), own_node)
        chosen.add(min((p for p in positions if p > own_position), default=min(positions))[1])
        chosen.add(max((p for p in positions if p < own_position), default=max(positions))[1])
    return chosen


@functools.lru_cache(maxsize=1 << 14)
def _place(blob: str, ring: int, node: str) -> bytes:
    return hashlib.blake2b(f"{blob}/{ring}/{node}".encode(), digest_size=8).digest()
