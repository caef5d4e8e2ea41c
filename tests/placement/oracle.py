"""The layout problem by brute force, straight from its definition. It shares only the structs with the solver."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import msgspec

from shoal_placement.solver.problem import Node, Problem

INF = float("inf")


def stage(problem: Problem, node: Node, first: int, last: int) -> tuple[int, float, int, float]:
    """Return bytes, seconds, bytes to fetch and prices of layers [first, last) on a node."""
    end = len(problem.layer_bytes)
    work = list(problem.layer_work) or [1.0] * end
    fetch = list(node.fetch_bytes) or [0] * end
    held, seconds, fetched = sum(problem.layer_bytes[first:last]), sum(work[first:last]), sum(fetch[first:last])
    if first == 0:
        held, seconds, fetched = (
            held + problem.embed_bytes,
            seconds + problem.embed_work,
            fetched + node.fetch_embed_bytes,
        )
    if last == end:
        held, seconds, fetched = (
            held + problem.head_bytes,
            seconds + problem.head_work,
            fetched + node.fetch_head_bytes,
        )
    if first == 0 and last == end and problem.tied:
        held -= problem.embed_bytes
        fetched -= min(node.fetch_embed_bytes, node.fetch_head_bytes)
    prices = node.price_s_per_byte * held + problem.fetch_price_s_per_byte * fetched
    return held + problem.stage_bytes, seconds * node.s_per_work, fetched, prices


def cost(problem: Problem, order: Sequence[int], cuts: Sequence[int]) -> float:
    """Return the cost that is minimized; infinite for a layout that is not allowed."""
    nodes = [problem.nodes[i] for i in order]
    if not problem.min_nodes <= len(order) <= problem.max_nodes:
        return INF
    if not set(problem.layer_counts) <= {n.name for n in nodes}:
        return INF
    total, slowest, fetched = 0.0, 0.0, 0
    for node, (first, last) in zip(nodes, itertools.pairwise(cuts), strict=True):
        held, seconds, fetch, prices = stage(problem, node, first, last)
        if held > node.free_bytes or problem.layer_counts.get(node.name, last - first) != last - first:
            return INF
        total, slowest, fetched = total + seconds + prices, max(slowest, seconds), fetched + fetch
    if problem.max_fetch_bytes is not None and fetched > problem.max_fetch_bytes:
        return INF
    if len(problem.link_s) and len(order) > 1:
        total += sum(problem.link_s[a][b] for a, b in zip(order, [*order[1:], order[0]], strict=True))
    return max(total, (problem.in_flight or len(order)) * slowest)


def every_layout(problem: Problem, stages: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield all orders of so many nodes with all splits, whether or not they fit."""
    count = len(problem.layer_bytes)
    for order in itertools.permutations(range(len(problem.nodes)), stages):
        for cuts in itertools.combinations(range(1, count), stages - 1):
            yield order, (0, *cuts, count)


def best_by_count(problem: Problem) -> dict[int, float]:
    """Return the least cost over exactly k nodes, for each k; infinite if nothing is allowed."""
    most = min(len(problem.nodes), len(problem.layer_bytes), problem.max_nodes)
    return {
        k: min((cost(problem, o, c) for o, c in every_layout(problem, k)), default=INF)
        for k in range(max(problem.min_nodes, 1), most + 1)
    }


def random_problem(chance: random.Random, nodes: int, layers: int, equal: bool = False) -> Problem:
    """Return a small cluster with a model that may or may not fit, using every field that a problem has."""
    sizes = [chance.randint(4, 20) for _ in range(3)]
    kinds = [sizes[0] if equal else chance.choice(sizes) for _ in range(layers)]
    works = [1.0 if equal else chance.choice((1.0, 1.0, 0.7, 1.6, 2.3)) for _ in range(layers)]
    embed, tied = chance.choice((0, 7, 30)), chance.random() < 0.4
    whole = sum(kinds)
    names = [f"n{i}" for i in range(nodes)]
    links = chance.choice(("none", "same", "any", "classes"))

    def link() -> float:
        return {"same": 0.3, "any": chance.uniform(0.01, 2)}.get(links, chance.choice((0.05, 0.3, 3.0)))

    link_s = [[0.0 if a == b else link() for b in names] for a in names] if links != "none" else []
    kinds_of_node = [(int(whole * chance.uniform(0.1, 1.3)), chance.uniform(0.2, 3)) for _ in range(nodes)]
    members = []
    for name in names:
        free, speed = chance.choice(kinds_of_node)
        holds = chance.choice((0, 0, 1, 2))
        fetch = [] if holds == 0 else [chance.choice((0, b)) if holds == 1 else b for b in kinds]
        members.append(
            Node(
                name=name,
                free_bytes=free,
                s_per_work=speed,
                fetch_bytes=fetch,
                fetch_embed_bytes=embed if holds else 0,
                fetch_head_bytes=embed if holds else 0,
                price_s_per_byte=chance.choice((0.0, 0.0, 0.001)),
            )
        )
    least = chance.choice((1, 1, 1, 2, 3))
    return Problem(
        nodes=members,
        layer_bytes=kinds,
        layer_work=works,
        embed_bytes=embed,
        embed_work=chance.choice((0.0, 0.2)),
        head_bytes=chance.choice((0, 11)) + (embed if tied else 0),
        head_work=chance.choice((0.0, 0.9, 2.5)),
        tied=tied,
        stage_bytes=chance.choice((0, 3)),
        link_s=link_s,
        in_flight=chance.choice((1, 4, 8, 0)),
        min_nodes=least,
        max_nodes=chance.choice((least, nodes, nodes)) if least <= nodes else least,
        layer_counts={chance.choice(names): chance.randint(1, 3)} if chance.random() < 0.15 else {},
        max_fetch_bytes=int(whole * chance.uniform(0, 1)) if chance.random() < 0.25 else None,
        fetch_price_s_per_byte=chance.choice((0.0, 0.0, 0.01)),
    )


def with_in_flight(problem: Problem, in_flight: int) -> Problem:
    """Return the problem with another number of requests in flight."""
    return msgspec.structs.replace(problem, in_flight=in_flight)
