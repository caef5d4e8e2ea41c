"""Instances and their stages: what is wanted, and what is."""

from __future__ import annotations

from typing import Literal

from shoal_common.errors import ErrorBody
from shoal_common.messages import WireStruct
from shoal_common.messages.liveness import NodeAddress
from shoal_common.names import ModelId, model_id


class StageSpec(WireStruct):
    """The layers of an instance that run on one node."""

    rank: int
    """Position in the pipeline, from 0."""
    node: str
    """The node that runs the stage."""
    first_layer: int
    """First layer."""
    last_layer: int
    """The layer after the last one."""


class PlacementConstraints(WireStruct):
    """What people asked of a layout, with the fields of `place`; later layouts of the instance respect it."""

    min_nodes: int = 1
    """Minimum number of nodes."""
    max_nodes: int = 16
    """Maximum number of nodes."""
    nodes: list[str] = []
    """Use only these nodes; empty means any."""
    excluded_nodes: list[str] = []
    """Do not use these nodes."""
    objective: Literal["latency", "throughput", "balanced"] = "latency"
    """What the layout is optimized for."""
    in_flight: int = 0
    """Concurrent answers that `throughput` optimizes for; 0 means 4."""
    max_parallel_answers: int = 1
    """Answers of full context length to reserve KV cache for."""
    allow_low_memory: bool = False
    """Allow the tier `tight`."""
    force: bool = False
    """Allow the tier `force`."""
    layers: dict[str, int] = {}
    """Exact number of layers on these nodes."""
    max_fetch_bytes: int | None = None
    """Maximum bytes that all nodes together may download; null means no limit."""


class InstanceSpec(WireStruct):
    """A placed model. Its stages are in rank order and cover every layer once.

    `spec` key `instance.<id>`, published by placement's leader.
    """

    id: str
    """The instance's id."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    stages: list[StageSpec]
    """The stages in rank order."""
    context_tokens: int
    """Context length that KV cache is reserved for."""
    epoch: int = 1
    """Number of the layout: every new layout of the instance counts up."""
    created_at_s: float = 0.0
    """When the instance was placed."""
    constraints: PlacementConstraints = PlacementConstraints()
    """What people asked of the layout."""
    tier: Literal["fits", "tight", "force"] = "fits"
    """Memory tier that the layout needed."""

    @property
    def model(self) -> ModelId:
        """`org/name@commit`."""
        return model_id(self.repo, self.commit)


StagePhase = Literal["fetching", "loading", "linking", "ready", "failed"]


class StageState(WireStruct):
    """State of a stage, and its address for its neighbour.

    `state` key `stage.<id>.<rank>`, published by inference of its node.
    """

    instance: str
    """The instance's id."""
    rank: int
    """Position in the pipeline, from 0."""
    node: str
    """The node that runs the stage."""
    epoch: int
    """The layout that the stage belongs to."""
    phase: StagePhase
    """Current phase."""
    address: str = ""
    """`host:port` of its activation port, once it listens."""
    links: list[NodeAddress] = []
    """All addresses of that port, best first."""
    weight_bytes: int = 0
    """Bytes of its layers' tensors, once they are loaded."""
    error: ErrorBody | None = None
    """Why the stage failed, or, while it is `linking`, why it has no link to a neighbour."""
    uid: str = ""
    """Random id of this incarnation of the stage's process."""


InstancePhase = Literal["starting", "ready", "degraded", "failed"]


class InstanceState(WireStruct):
    """State of an instance as a whole. `state` key `instance.<id>`, published by placement's leader."""

    id: str
    """The instance's id."""
    repo: str
    """`org/name`."""
    commit: str
    """Commit id of the hub's repository."""
    phase: InstancePhase
    """Current phase."""
    nodes: list[str]
    """Nodes that run its stages, in rank order."""
    epoch: int = 1
    """Number of the current layout."""
    error: ErrorBody | None = None
    """Why it is degraded, failed or cannot start. Its details have `down_since_s`, by node, where nodes are down."""
