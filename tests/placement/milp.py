"""The layout problem as a mixed integer program for HiGHS. It shares only the structs with the solver.

A path through layers: x[l, i, j] = 1 if layer l is on node i and layer l + 1 on node j. Each node is entered once.
"""

from __future__ import annotations

import highspy

from shoal_placement.solver.problem import Problem
from tests.placement.oracle import INF


def solve_milp(problem: Problem, stages: int, deadline_s: float = 60.0) -> float | None:
    """Return the least cost over exactly so many nodes, at least two; infinite if nothing fits.

    None if HiGHS did not finish in time. For problems without required counts and without a limit to fetched bytes.
    """
    assert stages >= 2 and not problem.layer_counts and problem.max_fetch_bytes is None
    h = highspy.Highs()
    h.silent()
    h.setOptionValue("time_limit", deadline_s)
    h.setOptionValue("mip_rel_gap", 1e-9)
    h.setOptionValue("mip_abs_gap", 1e-12)
    nodes, end = range(len(problem.nodes)), len(problem.layer_bytes)
    work = list(problem.layer_work) or [1.0] * end
    work[0] += problem.embed_work
    work[-1] += problem.head_work
    taken = list(problem.layer_bytes)
    taken[0] += problem.embed_bytes
    taken[-1] += problem.head_bytes
    on = [[h.addBinary() for _ in range(end)] for _ in nodes]
    step = [[[h.addBinary() for _ in nodes] for _ in nodes] for _ in range(end - 1)]
    back = [[h.addBinary() for _ in nodes] for _ in nodes]
    for layer in range(end):
        h.addConstr(h.qsum(on[i][layer] for i in nodes) == 1)
    for layer in range(end - 1):
        for i in nodes:
            h.addConstr(h.qsum(step[layer][i]) == on[i][layer])
            h.addConstr(h.qsum(step[layer][j][i] for j in nodes) == on[i][layer + 1])
    for i in nodes:
        h.addConstr(h.qsum(back[i]) == on[i][end - 1])
        h.addConstr(h.qsum(back[j][i] for j in nodes) == on[i][0])
    begun = [on[i][0] + h.qsum(step[layer][j][i] for layer in range(end - 1) for j in nodes if j != i) for i in nodes]
    for own in begun:
        h.addConstr(own <= 1)
    h.addConstr(h.qsum(begun) == stages)
    total = []
    bottleneck = h.addVariable(lb=0)
    for i, node in enumerate(problem.nodes):
        # As shares of the node's memory, so that the rows have similar magnitudes.
        room = node.free_bytes - problem.stage_bytes
        if room <= 0:
            h.addConstr(h.qsum(on[i]) == 0)
        else:
            h.addConstr(h.qsum(on[i][layer] * (taken[layer] / room) for layer in range(end)) <= 1)
        seconds = h.qsum(on[i][layer] * (work[layer] * node.s_per_work) for layer in range(end))
        h.addConstr(seconds <= bottleneck)
        fetch = list(node.fetch_bytes) or [0] * end
        fetch[0] += node.fetch_embed_bytes
        fetch[-1] += node.fetch_head_bytes
        price = [
            node.price_s_per_byte * taken[layer] + problem.fetch_price_s_per_byte * fetch[layer]
            for layer in range(end)
        ]
        total += [seconds, h.qsum(on[i][layer] * price[layer] for layer in range(end))]
        if len(problem.link_s):
            for j in nodes:
                total += [step[layer][i][j] * problem.link_s[i][j] for layer in range(end - 1) if i != j]
                total += [back[i][j] * problem.link_s[i][j]] if i != j else []
    cost = h.addVariable(lb=0)
    h.addConstr(cost >= h.qsum(total))
    h.addConstr(cost >= bottleneck * (problem.in_flight or stages))
    h.minimize(cost)
    status = h.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return INF
    if status != highspy.HighsModelStatus.kOptimal:
        return None
    return float(h.getInfo().objective_function_value)
