"""A placement plan: the layout, its tier, and the instance that it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from shoal_common.messages.instances import InstanceSpec, PlacementConstraints, StageSpec
from shoal_common.messages.model_shape import ModelShape
from shoal_common.messages.storage import ModelState
from shoal_placement.network.model import NetworkModel
from shoal_placement.planning.memory_tiers import MemoryTiers, Tier
from shoal_placement.solver import Layout

TIERS: tuple[Tier, ...] = ("fits", "tight", "force")
"""In the order in which they are tried."""


class PlacementPlan(msgspec.Struct, frozen=True):
    """The layout chosen for a request."""

    model: ModelState
    shape: ModelShape
    layout: Layout
    context_tokens: int
    tier: Tier = "fits"
    constraints: PlacementConstraints = PlacementConstraints()
    budgets: Mapping[str, MemoryTiers] = {}
    """The memory budget of each node for one more stage."""
    network: NetworkModel = NetworkModel()

    @property
    def name(self) -> str:
        """The name by which the layout can be requested: `a:14,b:2`."""
        return ",".join(f"{s.node}:{s.last - s.first}" for s in self.layout.slices)


def layout_name(stages: Iterable[StageSpec]) -> str:
    """Return the name of the layout of placed stages, given in rank order."""
    return ",".join(f"{s.node}:{s.last_layer - s.first_layer}" for s in stages)


def to_instance_spec(plan: PlacementPlan, instance: str, created_at_s: float) -> InstanceSpec:
    """Return the spec of the instance that runs a plan."""
    stages = [
        StageSpec(rank=rank, node=s.node, first_layer=s.first, last_layer=s.last)
        for rank, s in enumerate(plan.layout.slices)
    ]
    return InstanceSpec(
        id=instance,
        repo=plan.model.repo,
        commit=plan.model.commit,
        stages=stages,
        context_tokens=plan.context_tokens,
        created_at_s=created_at_s,
        constraints=plan.constraints,
        tier=plan.tier,
    )
