"""Who listens to whom about a blob: everybody up to 16 nodes; above, a random graph that all compute alike. Pure.

The graph is the union of five rings. Each ring has all nodes in another order, by a hash of the blob, the ring and
the node. So it is connected, nobody has more than ten neighbours, few nodes are far from each other, and a node that
comes or goes changes three edges of each ring and nothing else. Different blobs have different graphs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection

ALL_UP_TO_NODES = 16
RINGS = 5


def neighbours(me: str, nodes: Collection[str], blob: str) -> set[str]:
    """The nodes that `me` listens to and asks, of those that fetch or have this blob (`me` may be among them)."""
    others = set(nodes) - {me}
    if len(others) < ALL_UP_TO_NODES:
        return others
    found: set[str] = set()
    for ring in range(RINGS):
        placed = [(_place(blob, ring, node), node) for node in others]
        mine = (_place(blob, ring, me), me)
        found.add(min((p for p in placed if p > mine), default=min(placed))[1])
        found.add(max((p for p in placed if p < mine), default=max(placed))[1])
    return found


@functools.lru_cache(maxsize=1 << 14)
def _place(blob: str, ring: int, node: str) -> bytes:
    return hashlib.blake2b(f"{blob}/{ring}/{node}".encode(), digest_size=8).digest()
