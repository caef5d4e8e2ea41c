"""Placement's solver: whether it is correct and fast, blocks the event loop, and what it gains.

Correctness is checked against brute force on small clusters, against HiGHS on medium ones (if highspy is installed),
and against an independent check of what fits. Speed is measured on previews, which are the best layout over each
number of nodes, of 16, 32 and 1000 nodes, with realistic models and machines (tests/placement/random_clusters.py),
for one request in flight, eight, and as many as stages. The baseline is exo's rule: the fewest nodes whose total
memory is enough, of those with the most of it, and layers in proportion to it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from figures import Figure, figure, report  # noqa: E402  # after the path is set
from shoal_placement.solver.best_layout import solve, solve_each_count  # noqa: E402
from shoal_placement.solver.problem import IN_FLIGHT_PER_STAGE, Problem, Solution  # noqa: E402
from tests.placement import oracle  # noqa: E402
from tests.placement.oracle import INF, random_problem  # noqa: E402
from tests.placement.random_clusters import random_placement  # noqa: E402
from tests.placement.unit.test_feasible import problems_with, tight_problem  # noqa: E402

QUICK = "--quick" in sys.argv
FLIGHTS = (1, 8, IN_FLIGHT_PER_STAGE)
UNSEEN = 1000
"""Seeds from here on: clusters without cached results, because each is solved once."""
TICK_S = 0.001


def cost_of(answer: Solution) -> float:
    """Return the cost of an answer's layout; infinite without one."""
    return INF if answer.layout is None else answer.layout.cost_s


def same(a: float, b: float, share: float) -> bool:
    """Return whether two costs are equal up to rounding."""
    return a == b or abs(a - b) <= share * max(abs(a), abs(b), 1.0)


def bruteforce_differences(count: int) -> int:
    """Return how many answers differ from the optimum: up to 5 nodes, models of up to 10 layers."""
    different = 0
    for seed in range(count):
        chance = random.Random(seed)
        nodes = chance.randint(1, 5)
        problem = random_problem(chance, nodes, chance.randint(1, 10 if nodes < 5 else 8))
        problem = oracle.with_in_flight(problem, (1, 4, 8)[seed % 3])
        least = min(oracle.best_by_count(problem).values(), default=INF)
        answer = solve(problem)
        different += not (answer.proved and same(cost_of(answer), least, 1e-7))
    return different


def milp_differences(count: int) -> tuple[int, int] | None:
    """Return how many answers differ from HiGHS's, of how many it solved, for 8 to 12 nodes. None without HiGHS."""
    try:
        from tests.placement.milp import solve_milp  # noqa: PLC0415  # it may not be installed
    except ImportError:
        print("highspy is not installed: its figures are left out", file=sys.stderr)
        return None
    different = ended = 0
    for seed in range(count):
        chance = random.Random(seed)
        nodes = chance.randint(8, 12)
        problem = random_problem(chance, nodes, chance.randint(nodes, nodes + 3))
        stages = chance.randint(2, 7)
        problem = msgspec.structs.replace(
            problem, layer_counts={}, max_fetch_bytes=None, min_nodes=stages, max_nodes=stages
        )
        least = solve_milp(problem, stages, deadline_s=5.0 if QUICK else 30.0)
        if least is None:
            continue
        ended += 1
        answer = solve(problem)
        # HiGHS keeps its rows to 1e-6.
        different += not (answer.proved and same(cost_of(answer), least, 2e-6))
    return different, ended


def feasibility_errors(count: int) -> int:
    """Return how often a fitting layout was refused, or one returned that does not fit."""
    chance = random.Random(1)
    return sum(problems_with(tight_problem(chance)) != "" for _ in range(count))


def problems(nodes: int, seeds: int, max_nodes: int) -> Iterator[Problem]:
    """Return realistic clusters, with each number of requests in flight."""
    for seed in range(seeds):
        for in_flight in FLIGHTS:
            yield random_placement(seed, nodes, in_flight, max_nodes)


def previews(nodes: int, seeds: int, max_nodes: int) -> tuple[list[float], list[dict[int, Solution]]]:
    """Return the seconds of each preview, and its results."""
    times_s, found = [], []
    for problem in problems(nodes, seeds, max_nodes):
        began = time.perf_counter()
        found.append(solve_each_count(problem))
        times_s.append(time.perf_counter() - began)
    return times_s, found


def cheapest_over_bound(answers: dict[int, Solution]) -> float | None:
    """Return the cost of a preview's cheapest layout; None if nothing fits."""
    layouts = [a for a in answers.values() if a.layout is not None]
    if not layouts:
        return None
    return min(cost_of(a) for a in layouts) / min(a.lower_bound_s for a in answers.values())


async def blocked_s(work: Callable[[], object]) -> float:
    """Return the latest delay of a tick of the event loop while a thread runs this."""
    worst_s, over = 0.0, asyncio.Event()

    async def tick() -> None:
        nonlocal worst_s
        while not over.is_set():
            due = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            worst_s = max(worst_s, time.perf_counter() - due)

    async with asyncio.TaskGroup() as tasks:
        ticking = tasks.create_task(tick())
        await asyncio.to_thread(work)
        over.set()
        await ticking
    return worst_s


def exo_cost(problem: Problem) -> float | None:
    """Return the cost of exo's layout; None if it finds none that fits."""
    whole = sum(problem.layer_bytes) + problem.embed_bytes + problem.head_bytes
    ranked = sorted(range(len(problem.nodes)), key=lambda i: -problem.nodes[i].free_bytes)
    layers = len(problem.layer_bytes)
    for k in range(1, min(len(ranked), layers) + 1):
        order = sorted(ranked[:k])
        free = [problem.nodes[i].free_bytes for i in order]
        if sum(free) < whole:
            continue
        exact = [layers * f / sum(free) for f in free]
        given = [max(int(e), 1) for e in exact]
        while sum(given) != layers:
            short = layers - sum(given)
            one = max(range(k), key=lambda i: (exact[i] - given[i]) * (1 if short > 0 else -1) if short > 0 or given[i] > 1 else -INF)  # noqa: E501  # fmt: skip
            given[one] += 1 if short > 0 else -1
        cuts = [sum(given[:i]) for i in range(k + 1)]
        cost = oracle.cost(problem, order, cuts)
        return None if cost == INF else cost
    return None


def exo_over_ours(in_flight: int, count: int) -> float:
    """Return the mean ratio of exo's costs to ours, on clusters where exo finds a layout."""
    ratios = []
    for seed in range(count):
        problem = random_placement(seed, 3 + seed % 6, in_flight)
        rule = exo_cost(problem)
        if rule is not None:
            ratios.append(rule / cost_of(solve(problem)))
    return statistics.mean(ratios)


def main() -> None:
    """Measure and report."""
    figures: dict[str, Figure] = {}
    solve_each_count(random_placement(0, 16, 1))  # builds the tables of subsets, once in a process

    for nodes, seeds, target_ms in ((16, 10, 50), (32, 8, 200)):
        times_s, found = previews(nodes, 3 if QUICK else seeds, nodes)
        figures[f"preview_ms_{nodes}"] = figure(statistics.median(times_s) * 1e3, "ms", f"<= {target_ms}")
        figures[f"preview_ms_{nodes}_worst"] = figure(max(times_s) * 1e3, "ms")
        answers = [a for each in found for a in each.values() if a.layout is not None]
        figures[f"preview_over_bound_{nodes}"] = figure(statistics.mean(a.cost_over_bound for a in answers), "x")
        figures[f"preview_proved_{nodes}"] = figure(statistics.mean(a.proved for a in answers), "of 1")
    first_s = []
    for seed in range(6 if QUICK else 30):
        problem = random_placement(UNSEEN + seed, 16, FLIGHTS[seed % len(FLIGHTS)])
        began = time.perf_counter()
        solve_each_count(problem)
        first_s.append(time.perf_counter() - began)
    figures["preview_ms_16_unseen"] = figure(statistics.median(first_s) * 1e3, "ms")
    times_s, found = previews(1000, 2 if QUICK else 6, 16)
    figures["preview_s_1000"] = figure(statistics.median(times_s), "s", "<= 1.5")
    over = [r for each in found if (r := cheapest_over_bound(each)) is not None]
    figures["cost_over_bound_1000"] = figure(statistics.mean(over), "x", "<= 1.05")
    figures["cost_over_bound_1000_worst"] = figure(max(over), "x")

    best_s, proved = [], []
    for problem in problems(16, 4 if QUICK else 20, 16):
        began = time.perf_counter()
        answer = solve(problem)
        best_s.append(time.perf_counter() - began)
        proved.append(answer.proved)
    figures["best_ms_16"] = figure(statistics.median(best_s) * 1e3, "ms")
    figures["best_ms_16_worst"] = figure(max(best_s) * 1e3, "ms")
    figures["best_proved_16"] = figure(statistics.mean(proved), "of 1", ">= 1")

    blocks = [
        asyncio.run(blocked_s(lambda p=problem: solve_each_count(p)))  # type: ignore[misc]  # a default binds it
        for nodes in (16, 32, 1000)
        for problem in problems(nodes, 1 if QUICK else 3, 16)
    ]
    figures["loop_block_ms"] = figure(max(blocks) * 1e3, "ms", "<= 20")
    figures["loop_block_ms_median"] = figure(statistics.median(blocks) * 1e3, "ms")
    for in_flight in (1, 4, 8):
        figures[f"exo_rule_c{in_flight}"] = figure(exo_over_ours(in_flight, 30 if QUICK else 200), "x")

    count = 200 if QUICK else 2000
    figures["bruteforce_differences"] = figure(bruteforce_differences(count), f"of {count}", "<= 0")
    count = 1000 if QUICK else 20_000
    figures["feasibility_errors"] = figure(feasibility_errors(count), f"of {count}", "<= 0")
    compared = milp_differences(4 if QUICK else 200)
    if compared is not None:
        figures["highs_differences"] = figure(compared[0], f"of {compared[1]}", "<= 0")
    report(figures)


if __name__ == "__main__":
    main()
