"""Plan a request: the best layout in the first tier that has one, or a refusal with figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from msgspec import structs

from shoal_common.errors import BadInput, NoMemory
from shoal_common.messages.placement import PlaceCommand
from shoal_common.units import format_bytes
from shoal_placement.planning.cluster_facts import ClusterFacts
from shoal_placement.planning.memory_tiers import Tier, tier_of
from shoal_placement.planning.plan import TIERS, PlacementPlan
from shoal_placement.planning.requests import (
    ResolvedRequest,
    allowed_tiers,
    parse_layout_name,
    requests_in_flight,
    resolve_request,
)
from shoal_placement.solver import slice_bytes, solve_balanced
from shoal_placement.solver.best_layout import solve_each_count
from shoal_placement.solver.cost import make_layout, meets_constraints


def plan_layout(request: PlaceCommand, cluster: ClusterFacts) -> PlacementPlan:
    """Return the best layout of the first tier that has one.

    Raises NotFound, Unsupported, BadInput, or NoMemory with figures of every node and, if the model fits only in a
    tier that the request does not allow, that tier.
    """
    resolved = resolve_request(request, cluster)
    if request.layout:
        return _plan_named_layout(resolved)
    allowed = allowed_tiers(request)
    for tier in TIERS:
        layout = solve_balanced(resolved.problem(tier, requests_in_flight(request)))
        if layout is not None and tier in allowed:
            return resolved.plan(layout, tier)
        if layout is not None:
            raise _no_room(resolved, tier)
    raise _no_room(resolved, None)


def plan_previews(request: PlaceCommand, cluster: ClusterFacts) -> list[PlacementPlan]:
    """Return for each number of nodes the best layout of the first tier that has one, whatever the request allows.

    The layout that `plan` would choose comes first. Raises what `plan` raises.
    """
    resolved = resolve_request(request, cluster)
    if request.layout:
        return [_plan_named_layout(structs.replace(resolved, request=structs.replace(request, force=True)))]
    plans: dict[int, PlacementPlan] = {}
    max_count = min(request.max_nodes, len(resolved.budgets), len(resolved.shape.layer_bytes))
    missing = list(range(request.min_nodes, max_count + 1))
    for tier in TIERS:
        if not missing:
            break
        problem = resolved.problem(tier, requests_in_flight(request))
        answers = solve_each_count(structs.replace(problem, min_nodes=missing[0], max_nodes=missing[-1]))
        for count in missing:
            if count in answers and (layout := answers[count].layout) is not None:
                plans[count] = resolved.plan(layout, tier)
        missing = [count for count in missing if count not in plans]
    if not plans:
        raise _no_room(resolved, None)
    return sorted(plans.values(), key=lambda p: (TIERS.index(p.tier), p.layout.cost_s, len(p.layout.slices)))


def candidate_nodes(plans: Sequence[PlacementPlan]) -> list[str]:
    """Return the nodes whose links matter to such a choice: the chosen ones, then those with the most memory."""
    chosen = dict.fromkeys(s.node for plan in plans for s in plan.layout.slices)
    others = sorted(plans[0].budgets, key=lambda node: (-plans[0].budgets[node].fits_bytes, node))
    return list({**chosen, **dict.fromkeys(others)})


def _plan_named_layout(resolved: ResolvedRequest) -> PlacementPlan:
    """Return the plan for the requested layout. Raises NoMemory if it does not fit in an allowed tier."""
    named, layers = parse_layout_name(resolved.request.layout), len(resolved.shape.layer_bytes)
    if sum(count for _, count in named) != layers:
        raise BadInput(f"layout {resolved.request.layout!r} must have {layers} layers in all, as the model has")
    excluded = [node for node, _ in named if node not in resolved.budgets]
    if excluded:
        raise BadInput(f"the layout names {', '.join(excluded)}, which `nodes` or `without` of the request exclude")
    cuts = [0]
    for _, count in named:
        cuts.append(cuts[-1] + count)
    needed = [slice_bytes(resolved.need, first, last) for first, last in pairwise(cuts)]
    stage_tiers = [
        tier_of(size + resolved.unfused(n), resolved.budgets[n]) for (n, _), size in zip(named, needed, strict=True)
    ]
    if None in stage_tiers:
        raise _no_room(resolved, None)
    tier = max((t for t in stage_tiers if t is not None), key=TIERS.index)
    if tier not in allowed_tiers(resolved.request):
        raise _no_room(resolved, tier)
    problem = resolved.problem(tier, requests_in_flight(resolved.request))
    names = [node.name for node in problem.nodes]
    layout = make_layout(problem, [names.index(node) for node, _ in named], cuts)
    if not meets_constraints(problem, layout):
        raise _no_room(resolved, None)
    return resolved.plan(layout, tier)


def _no_room(resolved: ResolvedRequest, fitting_tier: Tier | None) -> NoMemory:
    """Return the refusal. `fitting_tier`: the tier in which the model would fit, which the request does not allow."""
    need = resolved.need
    model_bytes = slice_bytes(need, 0, len(need.layer_bytes)) - need.stage_bytes
    free_bytes = sum(max(budget.fits_bytes, 0) for budget in resolved.budgets.values())
    one_layer_bytes = need.stage_bytes + max(need.layer_bytes)
    nodes = [
        {
            "node": node,
            "needed_bytes": one_layer_bytes + resolved.unfused(node),
            "available_bytes": max(budget.fits_bytes, 0),
            "tight_bytes": max(budget.tight_bytes, 0),
            "total_bytes": resolved.facts[node].memory_total_bytes,
        }
        for node, budget in sorted(resolved.budgets.items())
    ]
    figures = {
        "needed_bytes": model_bytes,
        "available_bytes": free_bytes,
        "nodes": nodes,
        "model": resolved.model.model,
    }
    return NoMemory(
        f"{resolved.model.repo} does not fit: {'. '.join(_reasons(resolved, model_bytes, fitting_tier))}",
        **figures,
        **({"tier": fitting_tier} if fitting_tier else {}),
    )


def _reasons(resolved: ResolvedRequest, model_bytes: int, fitting_tier: Tier | None) -> Iterator[str]:
    request, need, budgets = resolved.request, resolved.need, resolved.budgets
    if len(budgets) < request.min_nodes:
        yield f"needs {request.min_nodes} nodes; {len(budgets)} available"
        return
    if len(need.layer_bytes) < request.min_nodes:
        yield f"needs {request.min_nodes} nodes; the model has only {len(need.layer_bytes)} layers"
        return
    free = ", ".join(f"{node} {format_bytes(max(budget.fits_bytes, 0))}" for node, budget in sorted(budgets.items()))
    stage_bytes = need.stage_bytes + max((resolved.unfused(node) for node in budgets), default=0)
    needed = f"it needs {format_bytes(model_bytes)}, and {format_bytes(stage_bytes)} more per stage"
    yield f"{needed}; free: {free or 'no nodes'}"
    stop = "Stop an instance (`shoal ps`) or another program"
    if fitting_tier == "tight":
        yield (
            f"{stop}, or use --allow-low-memory to take memory that other programs use: the nodes may swap, and "
            "answers take longer"
        )
    elif fitting_tier == "force":
        yield f"{stop}, or add a node; --force also takes the memory reserved for the system"
    else:
        yield "Stop an instance (`shoal ps`), add a node, or request a shorter context"
