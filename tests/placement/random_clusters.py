"""Realistic random clusters and models, for benchmarks and for tests of large clusters."""

from __future__ import annotations

import random

from shoal_placement.solver.problem import Node, Problem

GB = 10**9
MACHINES = (
    (8, 100), (16, 120), (24, 150), (36, 300), (48, 400), (64, 410), (96, 546), (128, 546), (192, 800), (256, 819),
    (512, 819),
)  # fmt: skip
"""Gigabytes of memory, and its bandwidth in gigabytes per second."""
CONTEXT_TOKENS = 8192


def dense() -> tuple[list[int], list[float], int]:
    """Return bytes, work in GB and an end's bytes of 80 equal layers, like a 4-bit model of 70 billion parameters."""
    kv = 4096 * CONTEXT_TOKENS // 4
    return [480_000_000 + kv] * 80, [0.48] * 80, 600_000_000


def experts() -> tuple[list[int], list[float], int]:
    """Return the same for three dense layers and 45 with experts, of which a token reads some."""
    kv = 1152 * CONTEXT_TOKENS
    return [330_000_000 + kv] * 3 + [2_200_000_000 + kv] * 45, [0.33] * 3 + [0.36] * 45, 500_000_000


def windows() -> tuple[list[int], list[float], int]:
    """Return the same for layers with different caches: every sixth keeps all of the context, the others a window."""
    held = [300_000_000 + (500_000_000 if i % 6 == 5 else 30_000_000) for i in range(48)]
    return held, [0.55 if i % 6 == 5 else 0.32 for i in range(48)], 600_000_000


def random_cluster(chance: random.Random, nodes: int) -> tuple[list[Node], list[list[float]]]:
    """Return machines of all sizes and their links: wired, some on Wi-Fi, or in racks with fast links."""
    members = []
    for i in range(nodes):
        memory_gb, bandwidth_gb = chance.choice(MACHINES)
        free = int(memory_gb * GB * chance.uniform(0.5, 0.8))
        members.append(Node(f"n{i:04}", free, s_per_work=chance.uniform(1.0, 1.15) / bandwidth_gb))
    kind = chance.choice(("wired", "wireless", "racks"))
    wireless = [kind == "wireless" and chance.random() < 0.3 for _ in members]
    rack = [chance.randrange(3) for _ in members]

    def link(a: int, b: int) -> float:
        base = 3e-3 if wireless[a] or wireless[b] else 350e-6
        if kind == "racks" and rack[a] == rack[b]:
            base = 80e-6
        return base * chance.uniform(0.9, 1.2)

    return members, [[0.0 if a == b else link(a, b) for b in range(nodes)] for a in range(nodes)]


def random_placement(seed: int, nodes: int, in_flight: int, max_nodes: int = 16) -> Problem:
    """Return the layout problem of a random model over a random cluster."""
    chance = random.Random(seed)
    members, link_s = random_cluster(chance, nodes)
    layer_bytes, layer_work, end_bytes = chance.choice((dense, experts, windows))()
    return Problem(
        nodes=members,
        layer_bytes=layer_bytes,
        layer_work=layer_work,
        embed_bytes=end_bytes,
        head_bytes=end_bytes,
        head_work=end_bytes / GB,
        stage_bytes=96 << 20,
        link_s=link_s,
        in_flight=in_flight,
        max_nodes=max_nodes,
    )
